"""TensorBoard's event files, read without TensorBoard: records, then the few fields of a scalar.

A file is a row of records (length, its check sum, bytes, their check sum), each a protocol buffer
`Event`. Only what a scalar needs is decoded: ``Event.step`` and ``Event.summary``, and of each
value its tag and either ``simple_value`` or a tensor of one number, which newer writers use.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from lisa_analysis.rundir.logs.protobuf import Message, fields_of

# Fields of the messages: tensorboard/compat/proto/event.proto, summary.proto and tensor.proto.
_STEP, _SUMMARY = 2, 5
_VALUE = 1
_TAG, _SIMPLE, _TENSOR = 1, 2, 8
_TYPE, _CONTENT, _FLOATS, _DOUBLES = 1, 4, 5, 6
_NUMBERS = {1: "<f", 2: "<d"}  # DT_FLOAT, DT_DOUBLE
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reversed


def scalars(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (tag, step, value) of every scalar of a file, in its order.

    A record that was cut off by a kill, or that does not carry its check sum, ends the file.

    Raises
    ------
    OSError
        When the file cannot be read.
    """
    for record in _records(path.read_bytes()):
        try:
            event = list(fields_of(Message(record)))
            step = next((int(v) for n, v in event if n == _STEP and isinstance(v, int)), 0)
            for number, summary in event:
                if number == _SUMMARY and isinstance(summary, Message):
                    for tag, value in _values(summary):
                        yield tag, step, value
        except (ValueError, IndexError, struct.error):
            return


def _records(raw: bytes) -> Iterator[bytes]:
    position = 0
    while position + 12 <= len(raw):
        (length,) = struct.unpack_from("<Q", raw, position)
        (check,) = struct.unpack_from("<I", raw, position + 8)
        end = position + 12 + length + 4
        if check != masked_crc(raw[position : position + 8]) or end > len(raw):
            return
        yield raw[position + 12 : end - 4]
        position = end


def _values(summary: Message) -> Iterator[tuple[str, float]]:
    """The scalars of a summary; pictures, texts and histograms are passed over."""
    for number, value in fields_of(summary):
        if number != _VALUE or not isinstance(value, Message):
            continue
        tag, found = "", None
        for inner, content in fields_of(value):
            if inner == _TAG and isinstance(content, Message):
                tag = bytes(content).decode("utf-8")
            elif inner == _SIMPLE and isinstance(content, Message):
                (found,) = struct.unpack("<f", content)
            elif inner == _TENSOR and isinstance(content, Message):
                found = _number(content)
        if tag and found is not None:
            yield tag, float(found)


def _number(tensor: Message) -> float | None:
    """The number of a tensor that holds one; None for any other."""
    kind, content = 0, Message(b"")
    for number, value in fields_of(tensor):
        if number == _TYPE and isinstance(value, int):
            kind = value
        elif number in (_CONTENT, _FLOATS, _DOUBLES) and isinstance(value, Message):
            content = value
    layout = _NUMBERS.get(kind)
    if layout is None or len(content) != struct.calcsize(layout):
        return None
    return float(struct.unpack(layout, content)[0])


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        found.append(byte)
    return tuple(found)


_CRC = _table()


def masked_crc(data: bytes) -> int:
    """Return the check sum of TFRecord: CRC-32C, rotated and moved by a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
