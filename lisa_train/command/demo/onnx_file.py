"""The graph of an ONNX file: its operators and constants, read from the bytes (protobuf).

Three kinds of message are read, and of them what a conversion needs; the field numbers are those of
onnx.proto3. Numbers are fp32 or int64 and stand in `raw_data`; other constants are passed over.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.logs.protobuf import Message, fields_of, numbers_of

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
        for number, graph in fields_of(Message(file.read_bytes())):
            if number != 7:  # ModelProto.graph
                continue
            for part, message in fields_of(_bytes(graph)):
                if part == 1:  # GraphProto.node
                    nodes.append(_node(_bytes(message)))
                elif part == 5:  # GraphProto.initializer
                    constants |= _tensor(_bytes(message))
    except (IndexError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise LisaError(f"{file} is not an ONNX file that can be read ({error}).") from error
    if not nodes:
        raise LisaError(f"{file} is not an ONNX file that can be read (no graph in it).")
    return nodes, constants


def _node(message: Message) -> Node:
    found: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}  # input, output, name, op_type
    for number, value in fields_of(message):
        if number in found:
            found[number].append(bytes(_bytes(value)).decode())
    return Node("".join(found[3]), "".join(found[4]), tuple(found[1]), tuple(found[2]))


def _tensor(message: Message) -> dict[str, np.ndarray]:
    """Return one constant by its name, or nothing where it is of another kind."""
    shape: list[int] = []
    name, kind, raw = "", 0, b""
    for number, value in fields_of(message):
        if number == 1:  # dims, packed or one by one
            shape += [value] if isinstance(value, int) else list(numbers_of(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = bytes(_bytes(value)).decode()
        elif number == 9:
            raw = bytes(_bytes(value))
    if kind not in _DTYPES or not raw:
        return {}
    return {name: np.frombuffer(raw, _DTYPES[kind]).reshape(shape)}


def _bytes(value: int | Message) -> Message:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value
