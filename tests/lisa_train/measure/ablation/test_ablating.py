"""Every unit against weights that are swapped by hand, on many architectures."""

import numpy as np
import pytest
import torch
from helpers_ablating import (
    base_and_trained,
    build,
    by_hand,
    change_of,
    mixed,
    prepared,
    rows_of,
    stored,
)

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import ABLATION, ABLATION_UNFINISHED
from lisa_train.measure.ablation.ablating import ablate_units
from lisa_train.measure.ablation.file import AblationFile, Key
from lisa_train.measure.ablation.passes import Passes
from lisa_train.measure.ablation.units import AblatedUnit, make_units
from lisa_train.model.layer_map import find_layers

ABOUT = {"model": "final", "base": "base", "dtype": "float32", "device": "cpu", "unmeasured": []}
NAMES = (
    "llama", "gpt2", "mixtral", "bert", "bert_classifier", "t5", "vit", "albert", "whisper",
    "llama_reward", "gemma2", "gpt_neox", "qwen3_moe", "mamba", "falcon", "hubert",
)  # fmt: skip


def ablate(tmp_path, change, rows, units=None, folder="run", **options):
    """Measure in a folder of its own; return losses by key, and the cost."""
    losses, examples = prepared(change.model, rows)
    (tmp_path / folder).mkdir(exist_ok=True)
    file = AblationFile(tmp_path / folder, ABOUT, {"held_out": examples.measured})
    units = make_units(change.parts, change.kinds) if units is None else units
    cost = ablate_units(
        change, losses, {"held_out": examples}, units, file, progress=False, **options
    )
    return {key: values.data for key, values in file.losses.items()}, cost


def everything(change):
    return AblatedUnit("0-9", None, tuple(change.parts))


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_equals_weights_swapped_by_hand(tmp_path, name):
    base, trained = base_and_trained(name, tmp_path)
    rows, layer_map = rows_of(name), find_layers(trained)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    change = change_of(trained, tmp_path)
    assert change.unmeasured == []
    found, cost = ablate(tmp_path, change, rows)
    names = {str(i): list(tensors) for i, tensors in enumerate(layer_map.layers)}
    names |= {group: list(tensors) for group, tensors in layer_map.groups.items() if tensors}
    assert {key.unit for key in found} == {None, *names}
    for unit, tensors in names.items():
        for start, mode in (("trained", "reset"), ("base", "keep")):
            expected = by_hand(mixed(base, trained, tensors, start), rows)
            got = found[Key(unit, None, mode, "held_out")]
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for mode, model in (("trained", trained), ("base", base)):
        got = found[Key(None, None, mode, "held_out")]
        np.testing.assert_allclose(got, by_hand(model, rows), rtol=2e-5, atol=2e-5)
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    assert cost.passes < 2 * len(names) + 2


@pytest.mark.parametrize("name", NAMES)
def test_to_the_last_bit(tmp_path, name):
    """All taken out is the base, all put in the trained model; passes from a layer on are whole."""
    base, trained = base_and_trained(name, tmp_path)
    rows, change = rows_of(name), change_of(trained, tmp_path)
    ranges = [(0, 1)] if len(change) > 1 else None
    units = [*make_units(change.parts, change.kinds, "kind", ranges), everything(change)]
    units += make_units(change.parts, change.kinds)
    found, _ = ablate(tmp_path, change, rows, units)
    slow, _ = ablate(tmp_path, change, rows, units, folder="slow", reuse=False)
    assert found.keys() == slow.keys()
    for key in found:
        assert np.array_equal(found[key], slow[key]), key
    losses, examples = prepared(base, rows)
    loaded = np.empty(len(rows.rows))
    with torch.no_grad():
        for batch in examples.batches:
            loaded[list(batch.examples)] = losses(base, batch.inputs)
    whole = {mode: found[Key(None, None, mode, "held_out")] for mode in ("trained", "base")}
    assert np.array_equal(whole["base"], loaded)
    assert np.array_equal(found[Key("0-9", None, "reset", "held_out")], loaded)
    assert np.array_equal(found[Key("0-9", None, "keep", "held_out")], whole["trained"])
    assert not np.array_equal(whole["base"], whole["trained"])


def test_trained_weights_on_the_disk_and_in_memory_are_the_same(tmp_path):
    _, trained = base_and_trained("mixtral", tmp_path)
    rows = rows_of("mixtral")
    held = change_of(trained, tmp_path)
    first, _ = ablate(tmp_path, held, rows)
    assert held._held
    streamed = change_of(trained, tmp_path, trained=stored(trained, tmp_path / "final"))
    second, _ = ablate(tmp_path, streamed, rows, folder="streamed")
    assert not streamed._held
    assert all(np.array_equal(first[key], second[key]) for key in first)
    with torch.no_grad():  # what the disk does not say is held
        trained.lm_head.weight += 1
    changed = change_of(trained, tmp_path, trained=stored(trained, tmp_path / "final"))
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    ablate(tmp_path, changed, rows, folder="changed")
    assert len(changed._held) == 1
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())


@pytest.mark.parametrize("moment", [3, 12])
def test_after_an_error_the_model_is_as_it_was_found(tmp_path, moment, monkeypatch):
    """In the middle of a unit, of the trained model (3) and of the base (12)."""
    _, trained = base_and_trained("llama", tmp_path)
    trained.train()
    trained.lm_head.weight.requires_grad_(False)
    trained.model.layers[1].eval()
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    modes = [m.training for m in trained.modules()]
    flags = [p.requires_grad for p in trained.parameters()]
    original, calls = Passes.after, [0]

    def after(self, *args):
        calls[0] += 1
        if calls[0] == moment:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Passes, "after", after)
    with pytest.raises(KeyboardInterrupt):
        ablate(tmp_path, change_of(trained, tmp_path), rows_of("llama"))
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    assert [m.training for m in trained.modules()] == modes
    assert [p.requires_grad for p in trained.parameters()] == flags
    assert all("forward" not in m.__dict__ for m in trained.modules())
    assert (tmp_path / "run" / ABLATION_UNFINISHED).exists()
    assert not (tmp_path / "run" / ABLATION).exists()


def test_a_failure_while_the_base_is_put_in(tmp_path, monkeypatch):
    from lisa_train.measure.ablation.change import _Values

    _, trained = base_and_trained("llama", tmp_path)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    change, original = change_of(trained, tmp_path), _Values.some

    def some(self, numbers):
        for i, pair in enumerate(original(self, numbers)):
            if i == 20:
                raise OSError("the disk is gone")
            yield pair

    monkeypatch.setattr(_Values, "some", some)
    with pytest.raises(OSError, match="the disk is gone"):
        ablate(tmp_path, change, rows_of("llama"))
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())


def test_a_model_that_cannot_be_entered_in_the_middle(tmp_path):
    """A layer that counts its calls: passes are whole, the numbers right, and it is said."""
    _, trained = base_and_trained("llama", tmp_path)
    calls = [0]

    def hook(module, args, output):
        calls[0] += 1
        return output * (1 + 1e-3 * (calls[0] % 2))

    for layer in trained.model.layers:
        layer.mlp.register_forward_hook(hook)
    said = []
    found, cost = ablate(tmp_path, change_of(trained, tmp_path), rows_of("llama"), say=said.append)
    assert len(said) == 1
    assert "every pass runs the whole model" in said[0]
    assert cost.passes >= len(found)  # none of them a part


def test_a_file_of_other_weights_is_refused(tmp_path):
    _, trained = base_and_trained("llama", tmp_path)
    rows = rows_of("llama")
    change = change_of(trained, tmp_path)
    ablate(tmp_path, change, rows)
    with torch.no_grad():
        for p in trained.parameters():
            p *= 1.2
    units = make_units(change.parts, change.kinds, "kind")
    with pytest.raises(LisaError, match="was measured on other weights"):
        ablate(tmp_path, change_of(trained, tmp_path), rows, units)


def test_another_base_is_refused(tmp_path):
    _, trained = base_and_trained("llama", tmp_path)
    build("gpt2").save_pretrained(tmp_path / "other" / "base")
    with pytest.raises(LisaError, match=r"the base holds 0 of .* that is another model"):
        change_of(trained, tmp_path / "other")
    smaller = type(trained.config)(**trained.config.to_dict() | {"vocab_size": 32})
    small = type(trained)(smaller)
    small.save_pretrained(tmp_path / "small" / "base")
    with pytest.raises(LisaError, match=r"has the shape 32×16 in the base and 64×16"):
        change_of(trained, tmp_path / "small")


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_a_stop_while_weights_are_put_back_leaves_the_trained_ones(tmp_path, monkeypatch, after):
    _, trained = base_and_trained("llama", tmp_path)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    change = change_of(trained, tmp_path)
    values, left = change._values, [after]

    def struck(numbers, state):
        for each in values(numbers, state):
            if state == "trained":
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(change, "_values", struck)

    def stopped():
        with change.as_found():
            change.become("base")
            assert not torch.equal(trained.lm_head.weight, before["lm_head.weight"])
            change.become("trained")

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
