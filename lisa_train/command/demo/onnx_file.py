"""The graph of an ONNX file: its operators and constants, read from the bytes (protobuf).

Three kinds of message are read, and of them what a conversion needs; the field numbers are those of
onnx.proto3. Numbers are fp32 or int64 and stand in `raw_data`; other constants are passed over.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lisa_analysis.contract.errors import LisaError

_DTYPES = {1: "<f4", 7: "<i8"}


@dataclass(frozen=True)
class Node:
    """One operator of the graph."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(file: Path) -> tuple[list[Node], dict[str, np.ndarray]]:
    """Return the operators in their order, and the constants by name.

    Raises
    ------
    LisaError
        When the file is not of this format.
    """
    nodes: list[Node] = []
    constants: dict[str, np.ndarray] = {}
    try:
        for number, graph in _fields(memoryview(file.read_bytes())):
            if number != 7:  # ModelProto.graph
                continue
            for part, message in _fields(_bytes(graph)):
                if part == 1:  # GraphProto.node
                    nodes.append(_node(_bytes(message)))
                elif part == 5:  # GraphProto.initializer
                    constants |= _tensor(_bytes(message))
    except (IndexError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise LisaError(f"{file} is not an ONNX file that can be read ({error}).") from error
    if not nodes:
        raise LisaError(f"{file} is not an ONNX file that can be read (no graph in it).")
    return nodes, constants


def _node(message: memoryview) -> Node:
    found: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}  # input, output, name, op_type
    for number, value in _fields(message):
        if number in found:
            found[number].append(bytes(_bytes(value)).decode())
    return Node("".join(found[3]), "".join(found[4]), tuple(found[1]), tuple(found[2]))


def _tensor(message: memoryview) -> dict[str, np.ndarray]:
    """Return one constant by its name, or nothing where it is of another kind."""
    shape: list[int] = []
    name, kind, raw = "", 0, b""
    for number, value in _fields(message):
        if number == 1:  # dims, packed or one by one
            shape += [value] if isinstance(value, int) else list(_packed(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = bytes(_bytes(value)).decode()
        elif number == 9:
            raw = bytes(_bytes(value))
    if kind not in _DTYPES or not raw:
        return {}
    return {name: np.frombuffer(raw, _DTYPES[kind]).reshape(shape)}


def _fields(message: memoryview) -> Iterator[tuple[int, "int | memoryview"]]:
    """Yield number and value of each field of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field of an unknown kind {wire}")
        if at + size > len(message):
            raise ValueError("it ends within a field")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _packed(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _bytes(value: "int | memoryview") -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value
