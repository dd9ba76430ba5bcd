"""Protocol buffers: the examples of their specification, and what is no message."""

import struct

import pytest

from lisa_analysis.rundir.logs.protobuf import Message, fields_of, numbers_of


def read(raw):
    return [
        (number, value if isinstance(value, int) else bytes(value))
        for number, value in fields_of(Message(raw))
    ]


def test_the_examples_of_the_specification():
    assert read(b"\x08\x96\x01") == [(1, 150)]
    assert read(b"\x12\x07testing") == [(2, b"testing")]
    assert read(b"\x1a\x03\x08\x96\x01") == [(3, b"\x08\x96\x01")]
    assert list(numbers_of(Message(b"\x03\x8e\x02\x9e\xa7\x05"))) == [3, 270, 86942]


def test_numbers_of_fixed_width_and_below_zero():
    raw = b"\x0d" + struct.pack("<f", 1.5) + b"\x11" + struct.pack("<d", -2.5)
    assert read(raw) == [(1, struct.pack("<f", 1.5)), (2, struct.pack("<d", -2.5))]
    for value in (-1, -(2**63), 2**63 - 1):
        digits, bits = [], value & (1 << 64) - 1
        while bits >= 128:
            digits.append(bits & 127 | 128)
            bits >>= 7
        assert read(b"\x08" + bytes([*digits, bits])) == [(1, value)]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\x12\x07test", "longer than its message"),
        (b"\x0b", "wire type 3"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (b"\x12" + b"\xff" * 9 + b"\x01", "longer than its message"),  # a length of -1
    ],
)
def test_what_is_no_message(raw, error):
    with pytest.raises(ValueError, match=error):
        read(raw)


def test_a_message_that_ends_within_a_number():
    with pytest.raises(IndexError):
        read(b"\x08\x96")
