"""Every unit against weights that are swapped by hand, on many architectures."""

import numpy as np
import pytest
import torch
from helpers_ablating import (
    base_and_trained,
    by_hand,
    change_of,
    mixed,
    prepared,
    rows_of,
)

from lisa_train.measure.ablation.ablating import ablate_units
from lisa_train.measure.ablation.file import AblationFile, Key
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
