"""A resumed training is the interrupted one to the bit, or says what is missing."""

import dataclasses
import itertools
import json
import re
import shutil
import warnings

import pytest
import torch
from helpers_recording import arguments, examples, llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.rundir.opening import load
from lisa_train.command.cli import main

STEPS, HALF = 6, 3
LISA = lt.LisaConfig(activated_layers=1, interval_steps=2)


def made(
    folder, method="lisa", *, rows=None, model=None, lisa=LISA, incomplete=False, adapter=(),
    rates=None, **changes,
):  # fmt: skip
    model = model or llama(initializer_range=0.2)
    if method == "lora":
        torch.manual_seed(1)
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], **dict(adapter)}
        model = get_peft_model(model, LoraConfig(**settings))
    settings = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": HALF, "warmup_steps": 4,
        "lr_scheduler_type": "linear", **changes,
    }  # fmt: skip
    trainer = Trainer(
        model, arguments(folder / "out", **settings),
        train_dataset=examples() if rows is None else rows,
    )  # fmt: skip
    lt.attach(
        trainer, lisa=lisa if method == "lisa" else None, resume_incomplete=incomplete,
        record=lt.RecordConfig(str(folder / "run"), every=1), lr_multipliers=rates,
    )  # fmt: skip
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of every method: its folder and its last weights."""
    found = {}
    for method in ("full", "lora", "lisa"):
        folder = tmp_path_factory.mktemp(method)
        trainer = made(folder, method)
        trainer.train()
        found[method] = folder, weights(trainer)
    return found


def copied(whole, method, tmp_path):
    folder, last = whole[method]
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / "out" / f"checkpoint-{HALF}", last


FILES = {
    "full": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json", "config.json", "training_args.bin", "generation_config.json"],
    "lora": ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
             "rng_state.pth", "trainer_state.json", "training_args.bin", "README.md"],
}  # fmt: skip
HARMLESS = {"config.json", "training_args.bin", "generation_config.json", "README.md"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_file_of_a_checkpoint_is_missed_or_not_needed(whole, tmp_path, method):
    folder, checkpoint, last = copied(whole, method, tmp_path)
    assert sorted(p.name for p in checkpoint.iterdir()) == sorted(FILES[method])
    for name in FILES[method]:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        before = (folder / "run" / "run.json").read_bytes()
        trainer = made(folder, method)
        if name in HARMLESS:
            if name == "config.json":
                trainer.train(resume_from_checkpoint=str(checkpoint))
                assert equal(weights(trainer), last), name
        else:
            with pytest.raises(RunDirectoryError, match=name) as caught:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            assert str(checkpoint) in str(caught.value)
            assert trainer.state.global_step == 0
            assert (folder / "run" / "run.json").read_bytes() == before
        (checkpoint / name).write_bytes(content)
        if name not in HARMLESS:  # cut short by a full disk or a kill
            (checkpoint / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(RunDirectoryError, match=name):
                made(folder, method).train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(content)
    trainer = made(folder, method)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert equal(weights(trainer), last)


def test_weights_alone_go_on_only_when_asked_to_and_say_so(whole, tmp_path):
    """What such a training loses is seen in its weights: Trainer itself goes on without a word."""
    _, last = whole["full"]
    with pytest.warns(RuntimeWarning, match="save_only_model is set"):
        first = made(tmp_path, "full", save_only_model=True)
    first.train()
    assert "save_only_model" in warned(tmp_path)[0]
    checkpoint = tmp_path / "out" / f"checkpoint-{HALF}"
    with pytest.raises(RunDirectoryError, match="save_only_model") as caught:
        made(tmp_path, "full").train(resume_from_checkpoint=str(checkpoint))
    for words in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "resume_incomplete"):
        assert words in str(caught.value)
    trainer = made(tmp_path, "full", incomplete=True)
    with pytest.warns(RuntimeWarning, match="without the optimizer's state"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not equal(weights(trainer), last)
    resume = load(tmp_path / "run").events.query("event == 'resume'").iloc[-1]
    assert resume["step"] == HALF
    assert any("optimizer.pt" in text for text in resume["missing"])
    assert any("optimizer.pt" in text for text in warned(tmp_path))


def warned(folder):
    events = load(folder / "run").events
    return events.loc[events["event"] == "warning", "message"].tolist()


def changed(rows, number):
    rows = [dict(row) for row in rows]
    rows[number]["input_ids"] = rows[number]["input_ids"].flip(0)
    return rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": examples(60)}, r"64 rows, now 60"),
        ({"rows": changed(examples(), 50)}, "another content"),
        ({"learning_rate": 0.5}, r"learning_rate = 0\.01 \(now 0\.5\)"),
        ({"max_steps": 2 * STEPS}, r"max_steps = 6 \(now 12\)"),
        ({"seed": 3}, r"seed = 42 \(now 3\)"),
        ({"optim": "sgd"}, r"optim = adamw_torch \(now sgd\)"),
        ({"max_grad_norm": 0.1}, "max_grad_norm"),
        ({"lisa": dataclasses.replace(LISA, interval_steps=3)}, r"lisa\.interval_steps = 2 \(now"),
        ({"method": "full"}, "LISA, which is not attached now"),
        ({"ignore_data_skip": True}, "the place in the data"),
    ],
)
def test_other_inputs_are_refused_by_name(whole, tmp_path, changes, words):
    folder, checkpoint, _ = copied(whole, "lisa", tmp_path)
    before = (folder / "run" / "run.json").read_bytes()
    with pytest.raises(RunDirectoryError, match=words):
        made(folder, **changes).train(resume_from_checkpoint=str(checkpoint))
    assert (folder / "run" / "run.json").read_bytes() == before


def test_other_inputs_go_on_when_asked_to_and_are_an_event(whole, tmp_path):
    folder, checkpoint, _ = copied(whole, "lisa", tmp_path)
    trainer = made(folder, learning_rate=0.5, rows=examples(60), incomplete=True)
    with pytest.warns(RuntimeWarning, match="learning_rate"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    resume = load(folder / "run").events.query("event == 'resume'").iloc[-1]
    assert resume["changes"]["learning_rate"] == [0.01, 0.5]
    assert resume["changes"]["data"][1]["rows"] == 60


def test_the_weights_below_an_adapter_are_those_it_was_trained_on(whole, tmp_path):
    folder, checkpoint, _ = copied(whole, "lora", tmp_path)
    other = llama(initializer_range=0.2)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(RunDirectoryError, match="other weights below the adapter"):
        made(folder, "lora", model=other).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"lora_alpha": 3}, r"adapters\.default\.lora_alpha = 8 \(now 3\)"),
        ({"use_rslora": True}, r"use_rslora = False \(now True\)"),
        ({"lora_dropout": 0.5}, r"lora_dropout = 0\.0 \(now 0\.5\)"),
    ],
)
def test_an_adapter_of_other_settings_is_not_the_one_that_was_trained(
    whole, tmp_path, adapter, words
):
    """PEFT reads no settings from a checkpoint: those of the new adapter would act, unsaid."""
    folder, checkpoint, _ = copied(whole, "lora", tmp_path)
    with pytest.raises(RunDirectoryError, match=words):
        made(folder, "lora", adapter=adapter).train(resume_from_checkpoint=str(checkpoint))
    trainer = made(folder, "lora", adapter=adapter, incomplete=True)
    with pytest.warns(RuntimeWarning, match=words):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _with_frozen_layer():
    model = llama(initializer_range=0.2)
    model.model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"adapter": {"r": 4}}),
        ("lora", {"adapter": {"target_modules": ["q_proj"]}}),
        ("lora", {"adapter": {"use_dora": True}}),
        ("lora", {"adapter": {"modules_to_save": ["lm_head"]}}),
        ("full", {"model": _with_frozen_layer()}),
        ("full", {"model": llama(layers=4)}),
    ],
)
def test_other_tensors_that_train_are_refused_before_anything_is_loaded(
    whole, tmp_path, method, changes
):
    folder, checkpoint, _ = copied(whole, method, tmp_path)
    trainer = made(folder, method, incomplete=True, **changes)
    with pytest.raises(RunDirectoryError, match=r"other tensors that train \(.* now .*cannot load"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.bfloat16}, r"model\.dtype = float32 \(now bfloat16\)"),
        ({"attention_dropout": 0.5}, r"model\.attention_dropout = 0\.0 \(now 0\.5\)"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(whole, tmp_path, changes, words):
    folder, checkpoint, _ = copied(whole, "full", tmp_path)
    changes = dict(changes)
    dtype = changes.pop("dtype", torch.float32)
    model = llama(initializer_range=0.2, **changes).to(dtype)
    with pytest.raises(RunDirectoryError, match=words):
        made(folder, "full", model=model).train(resume_from_checkpoint=str(checkpoint))


def test_rates_by_layer_are_those_of_the_checkpoint(whole, tmp_path):
    """Trainer takes them from the optimizer's state: another file would do nothing, unsaid."""

    def file(name, *layers):
        text = {"schema": "lr-multipliers/1", "multipliers": dict(enumerate(layers))}
        (tmp_path / name).write_text(json.dumps(text))
        return tmp_path / name

    one, other = file("one.json", 1.0, 2.0, 0.5), file("other.json", 1.0, 0.5, 2.0)
    made(tmp_path, "full", rates=one).train()
    checkpoint = tmp_path / "out" / f"checkpoint-{HALF}"
    for rates, words in ((other, "other lr_multipliers"), (None, "which are not given now")):
        with pytest.raises(RunDirectoryError, match=words):
            made(tmp_path, "full", rates=rates).train(resume_from_checkpoint=str(checkpoint))
    made(tmp_path, "full", rates=one).train(resume_from_checkpoint=str(checkpoint))
    folder, checkpoint, _ = copied(whole, "full", tmp_path)
    with pytest.raises(RunDirectoryError, match="no lr_multipliers"):
        made(folder, "full", rates=one).train(resume_from_checkpoint=str(checkpoint))


def test_settings_of_trls_losses_are_compared(tmp_path):
    trainer = made(tmp_path, "full")
    trainer.args.label_smoothing = 0.0
    trainer.train()
    again = made(tmp_path, "full")
    again.args.label_smoothing = 0.1
    with pytest.raises(RunDirectoryError, match=r"label_smoothing = 0\.0 \(now 0\.1\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{HALF}"))


def test_an_adapter_that_trainer_cannot_load_is_refused_in_words(tmp_path):
    def model():
        found = llama(initializer_range=0.2)
        found.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        return found

    made(tmp_path, "full", model=model()).train()
    again = made(tmp_path, "full", model=model())
    with pytest.raises(RunDirectoryError, match=r"added by model\.add_adapter"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{HALF}"))


def test_the_engines_state_is_needed(whole, tmp_path):
    folder, checkpoint, _ = copied(whole, "lisa", tmp_path)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["lisa_toolkit"]
    path.write_text(json.dumps(state))
    with pytest.raises(RunDirectoryError, match="LISA's schedule"):
        made(folder).train(resume_from_checkpoint=str(checkpoint))


def test_fp32_tensors_and_the_loss_scale_are_needed(tmp_path):
    config = dataclasses.replace(LISA, precision="fp32_active")
    made(tmp_path, model=llama().to(torch.bfloat16), lisa=config).train()
    checkpoint = tmp_path / "out" / f"checkpoint-{HALF}"
    again = made(tmp_path, model=llama().to(torch.bfloat16), lisa=config)
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    (checkpoint / "lisa.pt").unlink()
    with pytest.raises(RunDirectoryError, match=r"scaler\.pt.*lisa\.pt"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_a_bare_trainer_is_taken_with_a_word(tmp_path, caplog):
    """Its files are all there; from what data it was made, nobody wrote down."""
    bare = Trainer(
        llama(), arguments(tmp_path / "out", save_strategy="steps", save_steps=2, max_steps=4),
        train_dataset=examples(),
    )  # fmt: skip
    bare.train()
    trainer = made(tmp_path, "full", model=llama(), max_steps=4, lr_scheduler_type="constant",
                   warmup_steps=0)  # fmt: skip
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "does not say from which data" in caplog.text
    assert equal(weights(trainer), weights(bare))


@pytest.mark.parametrize("kind", [lt.LisaCallback, lt.RecordCallback])
def test_callbacks_added_by_hand_say_what_was_lost(tmp_path, caplog, kind):
    """They hear of a resume when Trainer has loaded what there was."""

    def bare():
        changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
        trainer = Trainer(llama(), arguments(tmp_path / "out", **changes), train_dataset=examples())
        record = lt.RecordConfig(str(tmp_path / "run"))
        callback = kind(LISA) if kind is lt.LisaCallback else kind(trainer, record)
        trainer.add_callback(callback)
        return trainer

    bare().train()
    with caplog.at_level("WARNING"):
        bare().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert re.search(r"checkpoint-2 without the optimizer's state \(optimizer\.pt\)", caplog.text)


@pytest.mark.parametrize(
    ("batch", "accumulate", "place"),
    [(1, 2, "still takes 2 rows"), (4, 1, "a step took 2 rows and takes 4 now")],
)
def test_another_batch_goes_on_with_a_word_and_run_json_is_true(
    whole, tmp_path, batch, accumulate, place
):
    folder, checkpoint, _ = copied(whole, "full", tmp_path)
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    trainer = made(folder, "full", **changes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    said = [str(w.message) for w in said if "resumed from" in str(w.message)]
    assert len(said) == 1
    assert place in said[0]
    assert said[0] in warned(folder)
    run = load(folder / "run")
    resume = run.events.query("event == 'resume'").iloc[0]
    expected = {"per_device_train_batch_size": [2, batch]}
    if accumulate != 1:
        expected["gradient_accumulation_steps"] = [1, accumulate]
    assert resume["changes"] == expected
    assert resume["processes"] == 1
    segments = run.manifest["segments"]
    assert [s["segment"] for s in segments] == [0, 1]
    assert [s["step"] for s in segments] == [0, HALF]
    assert [s["per_device_train_batch_size"] for s in segments] == [2, batch]
    assert [s["gradient_accumulation_steps"] for s in segments] == [1, accumulate]


# --- lisa-train ---------------------------------------------------------------------------------


def test_the_command_refuses_weights_alone(tiny_model_dir, text_file, tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(text_file), "--method",
        "full", "--output_dir", str(out), "--max_length", "32", "--save_steps", "2",
        "--save_final_model", "false", "--trainer_args.save_only_model", "true", "--max_steps", "4",
    ]  # fmt: skip
    with pytest.warns(RuntimeWarning, match="save_only_model"):
        assert main(words) == 0
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    with pytest.warns(RuntimeWarning, match="save_only_model"):
        assert main([*words, "--resume"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "optimizer.pt" in said[-1]
    assert "--resume_incomplete true" in said[-1]
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main([*words, "--resume", "--resume_incomplete", "true"]) == 0
    assert any("without the optimizer's state" in str(w.message) for w in said)
    resume = load(out).events.query("event == 'resume'").iloc[0]
    assert any("optimizer.pt" in text for text in resume["missing"])
    assert load(out).scalars["step"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["", "- a list", "{broken", None])
def test_a_run_without_its_settings_cannot_resume(
    tiny_model_dir, text_file, tmp_path, capsys, damage
):
    from lisa_train.command.output import keep_inputs
    from lisa_train.config import TrainConfig

    path = tmp_path / "config.yaml"
    if damage is not None:
        path.write_text(damage)
    config = TrainConfig(str(tiny_model_dir), str(text_file), output_dir=str(tmp_path))
    with pytest.raises(LisaError, match=r"config\.yaml cannot be read"):
        keep_inputs(config, tmp_path, resume=True)


def test_settings_that_an_earlier_version_did_not_know_have_their_defaults(
    tiny_model_dir, text_file, tmp_path
):
    from lisa_train.command.output import keep_inputs, to_yaml
    from lisa_train.config import TrainConfig

    config = TrainConfig(
        str(tiny_model_dir), str(text_file), output_dir=str(tmp_path), max_grad_norm=0.0
    )
    kept = keep_inputs(config, tmp_path, resume=False)
    lines = to_yaml(kept).splitlines()
    old = [
        line for line in lines if not line.lstrip().startswith(("step_in_backward", "recompute"))
    ]
    assert len(old) == len(lines) - 2
    (tmp_path / "config.yaml").write_text("\n".join(old))
    keep_inputs(config, tmp_path, resume=True)
    other = dataclasses.replace(config, step_in_backward=True)
    with pytest.raises(LisaError, match="step_in_backward is True but the run to resume had False"):
        keep_inputs(other, tmp_path, resume=True)


def test_what_is_not_known_of_both_times_is_no_change():
    from lisa_train.trainer.continuation import _changes

    now = {
        "processes": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "device": "cpu", "settings": {"seed": 1}, "data": None, "base weights": "a", "lisa": None,
    }  # fmt: skip
    assert _changes({"processes": None}, now) == {}
    before = {**now, "processes": 2, "data": {"rows": 3}, "base weights": None}
    assert _changes(before, now) == {"processes": [2, 1]}
    before = {**now, "settings": {"seed": 2}, "lisa": {"activated_layers": 1}}
    assert _changes(before, now) == {"seed": [2, 1], "lisa": [{"activated_layers": 1}, None]}


def test_a_file_of_settings_is_known_by_its_content_wherever_it_lies(tmp_path):
    from lisa_train.trainer.continuation import _changes
    from lisa_train.trainer.training_inputs import lisa_content

    for name in ("typed.json", "kept.json"):
        (tmp_path / name).write_text("[0.5, 0.5]")
    (tmp_path / "other.json").write_text("[0.75, 0.25]")

    def noted(name, prior):
        learn = lt.LearnConfig(prior=str(tmp_path / prior))
        probabilities = str(tmp_path / name)
        config = lt.LisaConfig(1, 2, sampling="balanced", probabilities=probabilities)
        found = lisa_content(config)
        with_prior = lt.LisaConfig(1, 2, sampling="balanced", learn=learn)
        found["learn"] = lisa_content(with_prior)["learn"]
        return {"lisa": found}

    typed = noted("typed.json", "typed.json")
    assert _changes(typed, noted("kept.json", "kept.json")) == {}
    assert list(_changes(typed, noted("other.json", "kept.json"))) == ["lisa.probabilities"]
    assert list(_changes(typed, noted("kept.json", "other.json"))) == ["lisa.learn"]
    # Earlier checkpoints have the paths: what stood there is not known.
    earlier = {"lisa": {**typed["lisa"], "probabilities": "a.json"}}
    earlier["lisa"]["learn"] = {**typed["lisa"]["learn"], "prior": "a.json"}
    assert _changes(earlier, noted("kept.json", "kept.json")) == {}


def test_the_noted_content_of_data_sees_every_row_of_small_data():
    from datasets import Dataset

    from lisa_train.trainer.training_inputs import data_content

    rows = [{"text": f"row {i}", "tokens": [i, i + 1]} for i in range(200)]
    noted = {data_content(Dataset.from_list(rows))["content"]}
    for number, change in itertools.product((0, 77, 199), ({"text": "x"}, {"tokens": [1]})):
        other = [dict(row) for row in rows]
        other[number] |= change
        noted.add(data_content(Dataset.from_list(other))["content"])
    assert len(noted) == 7
    assert data_content(Dataset.from_list(rows))["content"] in noted
    assert data_content(iter(rows)) is None  # a stream
