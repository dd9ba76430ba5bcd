"""One step on several devices: weights sharded as FSDP2 does, or whole layers side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_train.estimate.result import DeviceMemory
from lisa_train.estimate.trace import ACTIVATIONS, GRADIENTS, LOGITS, WEIGHTS, Trace
from lisa_train.optim.step_copies import TOGETHER

_FP32 = 4


@dataclass(frozen=True)
class ParameterBytes:
    """What a parameter holds outside the trace, and where it lies.

    `copy` is its fp32 copy, and while it steps its gradient in fp32; `digits` what its gradient has
    beside bf16 while micro-batches are added up.
    """

    label: int
    state: int
    scratch: int
    copy: int = 0
    digits: int = 0


def whole(
    trace: Trace, held: list[ParameterBytes], *, at_once: bool, stepped: bool
) -> DeviceMemory:
    """Everything on one device. `stepped`: the optimizer has stepped inside backward."""
    return _device(trace, trace.bytes, held, at_once=at_once, stepped=stepped)


def by_layers(
    trace: Trace, held: list[ParameterBytes], place: Callable[[int], int], devices: int,
    *, at_once: bool, stepped: bool,
) -> tuple[DeviceMemory, ...]:  # fmt: skip
    """Every storage on the device of its layer; `place` gives it."""
    where = np.array([place(int(label)) for label in trace.labels])
    return tuple(
        _device(
            trace,
            np.where(where == device, trace.bytes, 0),
            [h for h in held if place(h.label) == device],
            at_once=at_once,
            stepped=stepped,
        )
        for device in range(devices)
    )


def sharded(
    trace: Trace,
    held: list[ParameterBytes],
    devices: int,
    layers: int,
    *,
    at_once: bool,
    stepped: bool,
) -> DeviceMemory:
    """One of `devices` equal devices under FSDP2 (`fully_shard` on every layer and the root).

    Weights, gradients and state are cut along their first dimension, padded to equal parts.
    While it computes, a device also holds: the root's weights (embedding, head, norm) from
    forward to the end of backward; two layers, the second being prefetched, and the buffer of
    one all-gather; the root's whole gradient until backward ends, and the larger of the root's
    and two layers' gradients, with which the reduce-scatter works. An upper estimate: they are
    taken to meet the peak of the activations.
    """
    fixed = (trace.kinds == WEIGHTS) | (trace.kinds == GRADIENTS)
    parts = -(-trace.rows // devices)
    sizes = np.where(fixed, trace.bytes // np.maximum(trace.rows, 1) * parts, trace.bytes)
    weights = _units(trace, WEIGHTS, layers)
    gradients = _units(trace, GRADIENTS, layers)
    gathered = weights["root"] + 3 * weights["layer"]
    scattered = gradients["root"] + max(gradients["root"], 2 * gradients["layer"])
    plain = _device(trace, sizes, held, at_once=at_once, stepped=stepped)
    extra = {"forward": gathered, "backward": gathered + scattered, "step": 0}
    phases = {phase: size + extra[phase] for phase, size in plain.phases.items()}
    return DeviceMemory(
        plain.weights, plain.gradients, plain.optimizer, plain.activations, plain.logits, phases
    )


def _units(trace: Trace, kind: int, layers: int) -> Mapping[str, int]:
    """Bytes of the largest layer and of everything outside the layers."""
    chosen = trace.kinds == kind
    inside = [int(trace.bytes[chosen & (trace.labels == i)].sum()) for i in range(layers)]
    outside = chosen & ((trace.labels < 0) | (trace.labels >= layers))
    return {"layer": max(inside, default=0), "root": int(trace.bytes[outside].sum())}


def _device(
    trace: Trace,
    sizes: NDArray[np.int64],
    held: list[ParameterBytes],
    *,
    at_once: bool,
    stepped: bool,
) -> DeviceMemory:
    """Peaks of one device from the storages that lie on it, with these sizes."""
    state, copies = sum(h.state for h in held), sum(h.copy for h in held)
    digits = sum(h.digits for h in held)
    start, forward, end = (trace.marks[mark] for mark in ("start", "forward", "end"))
    live = trace.live(sizes)
    gradients = trace.live(np.where(trace.kinds == GRADIENTS, sizes, 0))
    logits = trace.live(np.where(trace.kinds == LOGITS, sizes, 0))
    saved = trace.alive(forward) & (trace.kinds == ACTIVATIONS)
    phases = {
        "forward": int(live[start : forward + 1].max()) + state + copies,
        "backward": int(live[forward : end + 1].max()) + state + copies,
    }
    if digits:
        phases["forward"] += digits
        phases["backward"] += digits + max(h.digits for h in held)  # and one new sum
    if not stepped:
        phases["step"] = int(live[end]) + state + copies + _room(held, at_once=at_once)
    return DeviceMemory(
        weights=int(sizes[trace.kinds == WEIGHTS].sum()) + copies,
        gradients=int(gradients[start:].max()) + digits,
        optimizer=state,
        activations=int(sizes[saved].sum()),
        logits=int(logits.max()),
        phases=phases,
    )


def _room(held: list[ParameterBytes], *, at_once: bool) -> int:
    """What the optimizer allocates to step; an upper estimate where it steps copies in groups."""
    plain = [h.scratch for h in held if not h.copy]
    room = sum(plain) if at_once else max(plain, default=0)
    if copied := [h for h in held if h.copy]:
        each = [h.copy + h.scratch for h in copied]
        rate = max(size / h.copy for size, h in zip(each, copied, strict=True))
        room += min(sum(each), max(max(each), int(rate * TOGETHER * _FP32)))
    return room
