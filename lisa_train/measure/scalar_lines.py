"""The lines of the scalars, from the loop's numbers to the disk: one author for all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_analysis.contract.schema import SCALARS_TABLE
from lisa_train.measure.buffers import to_host
from lisa_train.measure.disk.manifest import peak_memory_bytes

_SCALARS = tuple(name for name in SCALARS_TABLE.names if name not in ("step", "segment"))


def check_names(scalars: Mapping[str, Any]) -> None:
    """Refuse a misspelt scalar where it is passed: the table is written much later."""
    for name in scalars:
        if name not in _SCALARS:
            raise ConfigError(
                f"{name!r} is no scalar that a run records, expected one of "
                f"{', '.join(_SCALARS)}.{suggest(name, _SCALARS)}"
            )


class ScalarLines:
    """Lines that wait for the other processes, then for the disk; numbers may be on a device.

    Parameters
    ----------
    optimizer
        Whose learning rate (of its first group) a line has that names none.
    devices
        The devices of the model.

    Attributes
    ----------
    unmerged : list of dict
        This process's own lines; `lisa_train.measure.processes` puts all processes' together.
    waiting : list of dict
        Those that wait for the disk.
    """

    def __init__(self, optimizer: Any, devices: Sequence[torch.device]) -> None:
        self._optimizer = optimizer
        self._devices = devices
        self.unmerged: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self._latest: dict[str, Any] = {}

    def begin(
        self, step: int, scalars: Mapping[str, Any], skipped: bool | torch.Tensor
    ) -> dict[str, Any]:
        """Return the line of a step with what the loop says of it; `add` it once it is measured."""
        line = {k: v.detach() if torch.is_tensor(v) else v for k, v in scalars.items()}
        line = {"step": step, **line}
        line["skipped"] = skipped if torch.is_tensor(skipped) else bool(skipped)
        return line

    def add(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        self.unmerged.append(line)

    def complete(self, line: dict[str, Any], squares: torch.Tensor | None) -> None:
        """Fill in what the loop did not say and can be seen from here.

        `squares` are those of all gradient norms of the step, if they were measured.
        """
        if squares is not None and line.get("grad_norm") is None:
            line["grad_norm"] = squares.sum().sqrt()
        if line.get("learning_rate") is None:
            rate = self._optimizer.param_groups[0]["lr"]
            line["learning_rate"] = rate.detach().clone() if torch.is_tensor(rate) else rate
        line["peak_memory_bytes"] = peak_memory_bytes(*self._devices)

    def amend(self, scalars: Mapping[str, Any]) -> None:
        """Add what became known late to the newest line."""
        check_names(scalars)
        for lines in (self.unmerged, self.waiting):
            if lines:
                lines[-1].update(scalars)
                return

    def merged(self, *, known: bool = True) -> None:
        """Let this process's lines wait for the disk.

        Unless they are `known`, what the other processes had to add to them stays unknown.
        """
        lines, self.unmerged = self.unmerged, []
        if not known:
            lines = [{**line, "loss": None, "tokens": None} for line in lines]
        self.waiting += lines

    def take(self) -> list[dict[str, Any]]:
        """Return and forget the waiting lines as they are written, with one copy per device."""
        lines = [_alone(line) for line in to_host(self.waiting)]
        if lines:
            self._latest = dict(lines[-1])
        self.waiting = []
        return [_tidy(line) for line in lines]

    def newest(self, *, wait: bool = False) -> dict[str, Any]:
        """Return the newest line that the host has, or with `wait` the last step's."""
        if self.waiting and (wait or all(device.type == "cpu" for device in self._devices)):
            return _alone(to_host(self.waiting[-1:])[0])
        return dict(self._latest)


def _alone(line: dict[str, Any]) -> dict[str, Any]:
    """Take the number of labels out of a line, and the loss where there was none."""
    labels = line.pop("labels", None)
    if labels == 0:
        line["loss"] = None
    return line


def _tidy(line: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as such, durations to the microsecond."""
    for name in ("tokens", "peak_memory_bytes"):
        value = line.get(name)
        if value is not None and math.isfinite(value):
            line[name] = int(value)
    for name in ("step_seconds", "recorder_seconds"):
        line[name] = round(float(line[name]), 6)
    return line


def count_tokens(inputs: Any) -> Any:
    """Count the tokens of a batch, padding left out, without waiting for the device."""
    if not isinstance(inputs, Mapping):
        return None
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if torch.is_tensor(mask) and mask.ndim == 2:
        return mask.sum()
    return ids.numel() if torch.is_tensor(ids) else None
