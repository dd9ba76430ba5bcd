"""The ablation itself: every unit taken out of the trained model, and put into the base alone."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.ablation.change import LearnedChange, State
from lisa_train.measure.ablation.file import AblationFile, Key
from lisa_train.measure.ablation.losses import Batch, ExampleLosses, Examples
from lisa_train.measure.ablation.passes import Kept, Passes
from lisa_train.measure.ablation.progress import Progress
from lisa_train.measure.ablation.sharing import Sharing
from lisa_train.measure.ablation.units import AblatedUnit
from lisa_train.model.parallel import processes

# What is kept of the layers' outputs takes so much of the free memory at most.
_SHARE = 0.25
_MODE: dict[State, str] = {"trained": "reset", "base": "keep"}
_OTHER: dict[State, State] = {"trained": "base", "base": "trained"}
# Relative difference of a loss to the one in the file, beyond which the model is another one.
_SAME = 1e-3
# Guess of the part of a pass that lies outside the layers (the head); for the time left alone.
_OUTSIDE = 0.2


@dataclass
class Cost:
    """What a call took.

    Attributes
    ----------
    passes
        Whole passes over all examples of a data, each counted by the part of the layers that it
        ran.
    seconds
        Time.
    whole, whole_seconds
        Passes of the whole model among them, and their time.
    """

    passes: float = 0.0
    seconds: float = 0.0
    whole: float = 0.0
    whole_seconds: float = 0.0


def ablate_units(
    change: LearnedChange,
    losses: ExampleLosses,
    data: Mapping[str, Examples],
    units: Sequence[AblatedUnit],
    file: AblationFile,
    *,
    reuse: bool = True,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Cost:
    """Measure what `file` does not hold yet, and write it.

    In several processes all call it together, with the same files and data; only one of them
    writes (`AblationFile.writes`). Each takes whole batches of one process.

    Parameters
    ----------
    change
        What the model learned; afterwards the model is as it was.
    losses
        How losses are taken.
    data
        Examples, by ``held_out`` and ``general``.
    units
        What is taken out and put in.
    file
        Takes the losses, chunk by chunk; what it holds already is not measured again.
    reuse
        Let layers below a unit return what they returned before.
    progress
        True shows a bar, false nothing; None a bar on a terminal, and a few lines elsewhere.
    say
        Takes sentences that a reader should know.

    Raises
    ------
    LisaError
        When what the file holds was measured on another model.
    RunDirectoryError
        When the disk refuses; what was measured is kept.
    """
    started = time.monotonic()
    ablation = _Ablation(change, losses, data, units, file, reuse, say)
    states: tuple[State, ...] = ("trained", "base")
    what = f"ablation of {len(units)} units"
    progress = progress if ablation.sharing.first else False
    with Progress(ablation.planned(), what, progress) as bar, change.as_found():
        for state in states:
            if any(ablation.todo(state, name) for name in data):
                change.become(state)
                for name in data:
                    ablation.measure(state, name, bar)
    cost = ablation.cost_of_all()
    cost.seconds = time.monotonic() - started
    file.finish(cost.passes, cost.seconds)
    return cost


class _Ablation:
    """One call: what there is to do, and what it has taken so far."""

    def __init__(
        self,
        change: LearnedChange,
        losses: ExampleLosses,
        data: Mapping[str, Examples],
        units: Sequence[AblatedUnit],
        file: AblationFile,
        reuse: bool,
        say: Callable[[str], None],
    ) -> None:
        self.change, self.data, self.units = change, data, units
        self.file, self.reuse, self.say = file, reuse, say
        self.passes = Passes(change.model, change.layer_map, losses)
        self.cost = Cost()
        self.sharing = Sharing()
        self._checked = False

    def cost_of_all(self) -> Cost:
        """What all processes have taken together."""
        every = self.sharing.gathered(self.cost)
        return Cost(
            passes=sum(cost.passes for cost in every),
            whole=sum(cost.whole for cost in every),
            whole_seconds=sum(cost.whole_seconds for cost in every),
        )

    def todo(self, state: State, name: str, batch: Batch | None = None) -> list[Key]:
        """What has no loss yet of the examples of a batch (None: of any)."""
        keys = [Key(None, None, state, name)]
        keys += [Key(unit.name, unit.kind, _MODE[state], name) for unit in self.units]
        missing = {key: self.file.missing(key) for key in keys}
        wanted = None if batch is None else list(batch.examples)
        return [
            key
            for key, numbers in missing.items()
            if len(numbers) and (wanted is None or np.isin(numbers, wanted).any())
        ]

    def planned(self) -> float:
        """Examples times passes that lie ahead, each pass by a guess of its part."""
        weights = {(unit.name, unit.kind): self._weight(unit) for unit in self.units}
        total = 0.0
        for state in _MODE:
            for name, examples in self.data.items():
                for batch in examples.batches:
                    keys = self.todo(state, name, batch)
                    parts = sum(weights[k.unit, k.kind] for k in keys if k.unit is not None)
                    total += len(batch.examples) * (parts + bool(keys))
        return total

    def _weight(self, unit: AblatedUnit) -> float:
        if not unit.parts:
            return 0.0
        layers = [part.unit for part in unit.parts if isinstance(part.unit, int)]
        if not self.reuse or len(layers) < len(unit.parts):
            return 1.0 if unit.name not in ("head", "norm") or not self.reuse else _OUTSIDE
        return 1 - (1 - _OUTSIDE) * min(layers) / len(self.change)

    def measure(self, state: State, name: str, bar: Progress) -> None:
        """Measure one data in one state of the whole model."""
        batches = [b for b in self.data[name].batches if self.todo(state, name, b)]
        whole = Key(None, None, state, name)
        for chunk, numbers in self._chunks(batches, whole, bar):
            for unit in self.units:
                key = Key(unit.name, unit.kind, _MODE[state], name)
                if np.isin(self.file.missing(key), numbers).any():
                    self._measure_unit(unit, key, whole, chunk, numbers, bar)

    def _measure_unit(
        self,
        unit: AblatedUnit,
        key: Key,
        whole: Key,
        chunk: list[tuple[Batch, Kept]],
        numbers: list[int],
        bar: Progress,
    ) -> None:
        if not unit.parts:  # nothing to take out or put in: the model is the same
            self.file.add(key, numbers, self.file.losses[whole].data[numbers].tolist())
            return
        begin = self.passes.begin(unit.parts) if self.reuse else 0
        values: list[float] = []
        if chunk:
            with self.change.put(unit.parts, _OTHER[self.change.state]):
                for batch, kept in chunk:
                    values += self.passes.after(begin, batch.inputs, kept).tolist()
                    self._count(batch, key.data)
                    bar.add(len(batch.examples) * self._weight(unit))
        mine = [number for batch, _ in chunk for number in batch.examples]
        for process, (measured, losses) in enumerate(self.sharing.gathered((mine, values))):
            if measured:
                self.file.add(key, measured, losses)
            if process != self.sharing.number:
                bar.add(len(measured) * self._weight(unit))

    def _chunks(
        self, batches: list[Batch], whole: Key, bar: Progress
    ) -> Iterator[tuple[list[tuple[Batch, Kept]], list[int]]]:
        """Pass the whole model over batches; yield as many together as memory holds outputs of.

        With them the numbers of the examples that all processes have passed over.
        """
        chunk: list[tuple[Batch, Kept]] = []
        passed: list[int] = []
        held = 0
        for batch, last in self.sharing.rounds(batches):
            found: tuple[list[int], list[float]] = ([], [])
            kept = Kept()
            if batch is not None:
                started = time.monotonic()
                values, kept = self.passes.record(batch.inputs)
                self.cost.whole += self._count(batch, whole.data)
                self.cost.whole_seconds += time.monotonic() - started
                found = list(batch.examples), values.tolist()
            for numbers, losses in self.sharing.gathered(found):
                if numbers:
                    self._take_whole(whole, numbers, losses)
                bar.add(len(numbers))
                passed += numbers
            if self.reuse and not self._checked:
                self._check_reuse(batch, kept, whole.data)
            if batch is not None:
                chunk.append((batch, kept if self.reuse else Kept()))
                held += kept.bytes if self.reuse else 0
            full = held > _SHARE * _free(self.change.model)
            if last or any(self.sharing.gathered(full)):
                yield chunk, passed
                chunk, passed, held = [], [], 0

    def _take_whole(self, key: Key, numbers: list[int], values: list[float]) -> None:
        """Keep the losses of the whole model, or hold them against those in the file."""
        if np.isin(self.file.missing(key), numbers).any():
            self.file.add(key, numbers, values)
            return
        before = self.file.losses[key].data[numbers]
        if not np.allclose(before, values, rtol=_SAME, atol=_SAME, equal_nan=True):
            raise LisaError(
                f"{self.file.path} holds other losses of the {key.mode} model than this one has "
                f"({before[0]:.4f} and {float(values[0]):.4f} nats on an example): it was measured "
                "on other weights; move the file away to measure anew."
            )

    def _check_reuse(self, batch: Batch | None, kept: Kept, name: str) -> None:
        """Hold passes that begin in the middle against whole ones, bit by bit, in every process."""
        self._checked = True
        mine = "" if batch is None else self._why_no_reuse(batch, kept, name)
        why = next((found for found in self.sharing.gathered(mine) if found), "")
        if why:
            self.reuse = False
            self.say(
                "every pass runs the whole model, since one that begins at a layer is not the same "
                f"to the last bit here ({why})"
            )

    def _why_no_reuse(self, batch: Batch, kept: Kept, name: str) -> str:
        begins = {self.passes.begin(unit.parts): unit for unit in self.units if unit.parts}
        found = sorted(begin for begin in begins if begin)
        why = ""
        for begin in {found[len(found) // 2], found[-1]} if found else ():
            with self.change.put(begins[begin].parts, _OTHER[self.change.state]):
                try:
                    short = self.passes.after(begin, batch.inputs, kept)
                    self._count(batch, name)
                    whole = self.passes.whole(batch.inputs)
                    self._count(batch, name)
                except RuntimeError as error:
                    why = " ".join(str(error).split())[:120]
                    continue
                if not torch.equal(short, whole):
                    why = "its losses are others"
        return why

    def _count(self, batch: Batch, name: str) -> float:
        """Count the pass that was just made; return its part of a pass over all examples."""
        part = self.passes.share * len(batch.examples) / len(self.file.tokens[name])
        self.cost.passes += part
        return part


def _free(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    # Processes on one host share what it has.
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if processes() > 1 else 1
    return int(psutil.virtual_memory().available) // here
