"""Private names of other libraries: all of them known, all there, and loud when they are gone."""

import ast
import dataclasses
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train import private_names
from lisa_train.private_names import TABLE, PrivateName, check

PACKAGE = Path(lt.__file__).parent


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.area}-{e.name}")
def test_the_pinned_versions_have_it(entry):
    assert dataclasses.replace(entry, if_loaded=False).exists()
    other = dataclasses.replace(entry, name=f"{entry.name}_of_another_version", if_loaded=False)
    assert not other.exists()  # the question can be answered with no


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.area}-{e.name}")
def test_the_table_names_who_uses_it(entry):
    for user in entry.users:
        text = (PACKAGE / f"{user}.py").read_text()
        pieces = re.escape(entry.name).replace("lora_embedding_", r"lora_(embedding_|\{kind\})")
        pieces = pieces.replace("lora_A", r"lora_(\{kind\})?A").replace(
            "lora_B", r"lora_(\{kind\})?B"
        )
        assert re.search(pieces, text), (entry.name, user)


def test_what_is_gone_is_said_with_the_version(monkeypatch):
    gone = PrivateName("here", "torch.nn:Module", "_no_such_thing", ("x",), "nothing trains")
    weak = dataclasses.replace(gone, area="there", refused=False)
    monkeypatch.setattr(private_names, "TABLE", (gone, weak))
    words = rf"torch {re.escape(torch.__version__)} has no Module\._no_such_thing, and without it"
    with pytest.raises(ConfigError, match=words + " nothing trains"):
        check("here")
    with pytest.warns(RuntimeWarning, match=words):
        check("there")
    check("elsewhere")


def lost(monkeypatch, area):
    """Let everything of an area be gone; return the entries."""
    before = PrivateName.exists
    monkeypatch.setattr(PrivateName, "exists", lambda e: e.area != area and before(e))
    return [entry for entry in TABLE if entry.area == area]


def heard(action):
    """What an action says: the error that ends it, and its warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            action()
        except ConfigError as error:
            return str(error), ""
    return "", " ".join(str(w.message) for w in said)


def attach(tmp_path, **settings):
    trainer = Trainer(llama(), arguments(tmp_path / "out"), train_dataset=examples())
    lt.attach(trainer, **settings)


def engine(optimizer=torch.optim.AdamW):
    model = llama()
    lt.Lisa(model, optimizer(model.parameters(), 1e-3), lt.LisaConfig(1)).close()


def schedule_free():
    pytest.importorskip("schedulefree")
    from schedulefree import AdamWScheduleFree

    engine(AdamWScheduleFree)


def recorder(tmp_path, model=None, **settings):
    model = model or llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path / "run"), **settings)).close()


def adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    recorder(tmp_path, get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))


def eight_bit(tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path / "o", optim="adamw_bnb_8bit"))
    lt.attach(trainer, eight_bit_states=("layers",))


def copies():
    config = lt.LisaConfig(1, precision="fp32_active")
    model = llama().bfloat16()
    lt.Lisa(model, torch.optim.SGD(model.parameters(), 0.1), config).close()


def in_backward():
    lt.StepInBackward(torch.optim.SGD(llama().parameters(), 0.1))


def in_backward_of_bitsandbytes():
    optim = pytest.importorskip("bitsandbytes.optim")
    lt.StepInBackward(optim.AdamW8bit(llama().parameters()))


def estimate():
    lt.estimate_memory(llama().config, "full", optim="sgd")


def estimated_head():
    from lisa_train.estimate.kernels import tiles_in_place

    with tiles_in_place():
        pass


def sharded_pass():
    from lisa_train.model.sharding import fsdp_groups

    fsdp_groups(llama())


def demo(monkeypatch):
    from lisa_train.command.demo.__main__ import _fast_bf16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _fast_bf16()


DOORS = {
    "trainer": lambda tmp, mp: attach(tmp, lisa=lt.LisaConfig(1)),
    "trl head": lambda tmp, mp: attach(tmp),
    "exceptions": lambda tmp, mp: attach(tmp, lisa=lt.LisaConfig(1)),
    "trainer probe": lambda tmp, mp: attach(
        tmp, record=lt.RecordConfig(str(tmp / "run"), probe_every=2)
    ),
    "model": lambda tmp, mp: engine(),
    "engine": lambda tmp, mp: engine(),
    "schedulefree": lambda tmp, mp: schedule_free(),
    "recorder": lambda tmp, mp: recorder(tmp),
    "base_delta": lambda tmp, mp: recorder(tmp, base_delta=True),
    "adapters": lambda tmp, mp: adapters(tmp),
    "eight bit": lambda tmp, mp: eight_bit(tmp),
    "bitsandbytes": lambda tmp, mp: in_backward_of_bitsandbytes(),
    "step in backward": lambda tmp, mp: in_backward(),
    "step of copies": lambda tmp, mp: copies(),
    "estimate": lambda tmp, mp: estimate(),
    "estimate trl": lambda tmp, mp: estimated_head(),
    "sharded": lambda tmp, mp: check(*private_needs(sharded=True)),
    "sharded probe": lambda tmp, mp: sharded_pass(),
    "sharded checkpoint": lambda tmp, mp: sharded_checkpoint(),
    "best weights": lambda tmp, mp: best_weights(),
    "demo": lambda tmp, mp: demo(mp),
}


def best_weights():
    from types import SimpleNamespace

    from lisa_train.trainer.renamed_weights import best_weights_whole

    trainer = SimpleNamespace(
        args=SimpleNamespace(load_best_model_at_end=True), _load_best_model=lambda: None
    )
    with best_weights_whole(trainer):
        pass


def sharded_checkpoint():
    from types import SimpleNamespace

    from lisa_train.trainer.sharded_checkpoint import own_optimizer_state

    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=object()))
    trainer = SimpleNamespace(
        accelerator=accelerator, _load_optimizer_and_scheduler=lambda checkpoint: None
    )
    with own_optimizer_state(trainer):
        pass


def private_needs(*, sharded):
    from types import SimpleNamespace

    from lisa_train.measure.recorder import _needed

    config = lt.RecordConfig("unused", probe_every=2)
    return _needed(llama(), config, SimpleNamespace(sharded=sharded))


def test_every_area_has_a_door():
    assert set(DOORS) == {entry.area for entry in TABLE}


@pytest.mark.parametrize("area", DOORS)
def test_every_door_is_loud(tmp_path, monkeypatch, area):
    """Where a part starts that needs names, they are asked for: nothing goes on in silence."""
    entries = lost(monkeypatch, area)
    error, said = heard(lambda: DOORS[area](tmp_path, monkeypatch))
    if any(entry.refused for entry in entries):
        first = next(entry for entry in entries if entry.refused)
        assert f"has no {first}" in error
        assert first.without in error
    else:
        assert not error
        for entry in entries:
            assert f"has no {entry}" in said
            assert entry.without in said


# --- nothing is used that the table does not know -----------------------------------------------

# Of Python itself, and a part of a name of ours.
NAMED_TUPLE = {"_fields", "_asdict", "_replace", "_make"}  # public, whatever they look like
OURS = {"_layerwise", "_watched", "_evaluation_loop"}


def private_accesses(tree):
    """Attributes and strings with a leading underscore that are asked of other objects."""
    own = {"self", "cls"}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for text in texts for part in text.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in parts and re.fullmatch("_[a-z][a-z_0-9]+", node.value):
                yield node.value
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lisa_"):
            yield from (alias.name for alias in node.names if re.match("_[a-z]", alias.name))


def defined_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_every_private_name_that_is_used_is_in_the_table():
    known = {entry.name for entry in TABLE} | OURS | NAMED_TUPLE
    known |= {part for entry in TABLE for part in re.findall(r"_[a-z_]+", entry.owner)}
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "private_names"]
    for path in files:
        tree = ast.parse(path.read_text())
        own = set(defined_names(tree))
        strange = set(private_accesses(tree)) - known - own
        assert not strange, (path.relative_to(PACKAGE), strange)


def test_asking_loads_nothing(monkeypatch):
    """An area of a library that is not in use is not a reason to load it."""
    gone = PrivateName(
        "x", "a_library_that_is_not_there.part:Thing", "_name", ("x",), "nothing", if_loaded=True
    )
    assert gone.exists()
    assert dataclasses.replace(gone, if_loaded=False).exists()
    present = set(sys.modules)
    check("trl head", "model")
    assert set(sys.modules) == present
