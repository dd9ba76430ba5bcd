"""Units: layers, groups, kinds and ranges, and the words that name them."""

import pytest

from lisa_analysis.contract.errors import ConfigError
from lisa_train.measure.ablation.units import Part, choose_units, make_units, read_ranges

KINDS = [{"attn.q", "norm"}, {"attn.q", "norm"}, {"attn.q", "mlp.up"}]
PARTS = [
    Part("a", 0, "attn.q"), Part("b", 0, "norm"), Part("c", 2, "attn.q"), Part("d", "head", "head"),
]  # fmt: skip


def named(units):
    return {str(u): "".join(p.name for p in u.parts) for u in units}


def test_every_layer_is_a_unit_and_groups_that_changed():
    assert named(make_units(PARTS, KINDS)) == {"0": "ab", "1": "", "2": "c", "head": "d"}


def test_kinds_that_changed_somewhere_in_every_layer_that_has_them():
    assert named(make_units(PARTS, KINDS, "kind")) == {
        "0 attn.q": "a", "0 norm": "b", "1 attn.q": "", "1 norm": "", "2 attn.q": "c", "head": "d",
    }  # fmt: skip


def test_layers_and_their_kinds_at_once():
    both = named(make_units(PARTS, KINDS, "both", 2))
    assert both == {**named(make_units(PARTS, KINDS, "layer", 2)),
                    **named(make_units(PARTS, KINDS, "kind"))}  # fmt: skip


def test_ranges():
    assert named(make_units(PARTS, KINDS, ranges=2)) | {} == {
        "0": "ab", "1": "", "2": "c", "head": "d", "0-1": "ab", "1-2": "c",
    }  # fmt: skip
    assert read_ranges("2", 3) == [(0, 1), (1, 2)]
    assert read_ranges(" 0-1, 1-2", 3) == [(0, 1), (1, 2)]
    assert read_ranges([(0, 2), "0-2"], 3) == [(0, 2)]
    assert read_ranges(None, 3) == []


@pytest.mark.parametrize("ranges", [1, 4, "0-3", "2-1", "1-1", "x", ["0-9"], [(0, 1, 2)], True])
def test_what_is_no_range(ranges):
    with pytest.raises(ConfigError, match="range"):
        read_ranges(ranges, 3)


def test_units_by_words():
    names, parts = choose_units("0-1,head", PARTS, 3)
    assert names == ["0", "1", "head"]
    assert [p.name for p in parts] == ["a", "b", "d"]
    assert choose_units([2, "0"], PARTS, 3)[0] == ["2", "0"]


@pytest.mark.parametrize(
    ("words", "says"),
    [("3", "'3' is no layer .0 to 2."), ("norm", "no group in which something was learned .head"),
     ("", "no layer to put back is named"), ("1", "nothing was learned in 1"), ("1-7", "range")],
)  # fmt: skip
def test_words_that_name_nothing(words, says):
    with pytest.raises(ConfigError, match=says):
        choose_units(words, PARTS, 3)
