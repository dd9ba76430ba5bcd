"""When every storage of a training step is born and dies, seen at torch's dispatcher."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, ACTIVATIONS, LOGITS = range(4)
KINDS = ("weights", "gradients", "activations", "logits")


class StorageLog(TorchDispatchMode):
    """Notes birth and death of every storage while it is active; runs on any tensors.

    A storage is noted once, however many views it has. Time counts births and deaths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = 0
        self.kind = ACTIVATIONS
        self.clock = 0
        self.bytes: list[int] = []
        self.born: list[int] = []
        self.died: dict[int, int] = {}
        self.kinds: list[int] = []
        self.labels: list[int] = []
        self.rows: list[int] = []
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf, self.kind, self.label)
        return result

    def note(self, tensor: torch.Tensor, kind: int, label: int) -> int:
        """Note the storage of `tensor`, if it is new; return its number."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key][0]
        number = len(self.bytes)
        self.bytes.append(storage.nbytes())
        self.born.append(self._tick())
        self.kinds.append(kind)
        self.labels.append(label)
        self.rows.append(tensor.shape[0] if tensor.ndim else 1)

        def gone(_: Any) -> None:
            self.died[number] = self._tick()
            self._known.pop(key, None)

        self._known[key] = (number, weakref.ref(storage, gone))
        return number

    def is_gradient(self, tensor: torch.Tensor, label: int) -> None:
        """Say that the storage of `tensor` turned out to be the gradient of a parameter."""
        number = self.note(tensor, GRADIENTS, label)
        self.kinds[number] = GRADIENTS
        self.labels[number] = label
        self.rows[number] = tensor.shape[0] if tensor.ndim else 1

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def freeze(self, marks: Mapping[str, int]) -> "Trace":
        """Return what was seen as arrays; `marks` are times worth remembering."""
        end = self.clock + 1
        return Trace(
            np.array(self.bytes, dtype=np.int64),
            np.array(self.kinds, dtype=np.int8),
            np.array(self.labels, dtype=np.int64),
            np.array(self.rows, dtype=np.int64),
            np.array(self.born, dtype=np.int64),
            np.array([self.died.get(i, end) for i in range(len(self.bytes))], dtype=np.int64),
            dict(marks),
        )


@dataclass(frozen=True)
class Trace:
    """The storages of one step: bytes, kind, label (where in the model), birth and death.

    `rows` is the first dimension, along which FSDP2 splits.
    """

    bytes: NDArray[np.int64]
    kinds: NDArray[np.int8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    born: NDArray[np.int64]
    died: NDArray[np.int64]
    marks: dict[str, int]

    def alive(self, time: int) -> NDArray[np.bool_]:
        """Which storages live at `time`."""
        return (self.born <= time) & (time < self.died)

    def at(self, time: int, sizes: NDArray[np.int64] | None = None) -> dict[str, int]:
        """Bytes of every kind that live at `time`, of `sizes` where given."""
        sizes = self.bytes if sizes is None else sizes
        alive = self.alive(time)
        return {
            name: int(sizes[alive & (self.kinds == kind)].sum()) for kind, name in enumerate(KINDS)
        }

    def saved(self) -> int:
        """Bytes that backward needs at the end of the forward pass."""
        kept = (self.kinds == ACTIVATIONS) | (self.kinds == LOGITS)
        return int(self.bytes[self.alive(self.marks["forward"]) & kept].sum())

    def live(self, sizes: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Bytes that live at every time from 0 to the last."""
        sizes = self.bytes if sizes is None else sizes
        change = np.zeros(
            int(max(self.died.max(initial=0), self.born.max(initial=0))) + 2, np.int64
        )
        np.add.at(change, self.born, sizes)
        np.add.at(change, self.died, -sizes)
        return np.cumsum(change)

    def peak(self, start: int, end: int, sizes: NDArray[np.int64] | None = None) -> int:
        """Time in [start, end] at which most bytes live."""
        return start + int(np.argmax(self.live(sizes)[start : end + 1]))
