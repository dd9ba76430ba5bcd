"""Sizes of cards on the command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.cards import parse_cards


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("24GB", [24 * 10**9]),
        ("24 GiB", [24 * 2**30]),
        ("16gb,80gib", [16 * 10**9, 80 * 2**30]),
        ("0.5TB , 512 MiB", [5 * 10**11, 2**29]),
    ],
)
def test_sizes_are_read(text, sizes):
    assert [card.bytes for card in parse_cards(text)] == sizes


@pytest.mark.parametrize("text", ["24 bananas", "24", "", "GB", "-3GB", "0GB", "24GB,,", "nanGB"])
def test_anything_else_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match="is not a size of memory; write a number and a unit"):
        parse_cards(text)


@given(st.integers(1, 10**6), st.sampled_from(["MB", "GB", "GiB"]))
def test_a_name_reads_back_as_the_same_size(number, unit):
    (card,) = parse_cards(f"{number}{unit}")
    assert parse_cards(card.name) == (card,)
