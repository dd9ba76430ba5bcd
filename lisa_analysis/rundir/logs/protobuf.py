"""Protocol buffers, read from the bytes: the fields of a message, without a schema or a library.

https://protobuf.dev/programming-guides/encoding: a field is a key (number and wire type) and a
number of variable length, 4 or 8 bytes, or a length and so many bytes.
"""

from collections.abc import Iterator

Message = memoryview


def fields_of(message: Message) -> Iterator[tuple[int, int | Message]]:
    """Yield number and value of every field: a number (signed, of 64 bits), or bytes.

    Raises
    ------
    ValueError
        For a wire type that there is not, a number that is too long, or a field that goes on
        behind the end of its message.
    IndexError
        When the message ends within a number.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if size < 0 or position + size > len(message):
            raise ValueError("a field is longer than its message")
        yield number, message[position : position + size]
        position += size


def numbers_of(message: Message) -> Iterator[int]:
    """Yield the numbers of a packed field, one after the other."""
    position = 0
    while position < len(message):
        value, position = _varint(message, position)
        yield value


def _varint(message: Message, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            value &= (1 << 64) - 1
            return (value - (1 << 64) if value >= 1 << 63 else value), position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
