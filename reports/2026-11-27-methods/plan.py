"""What is run of a task, in which order, and the rates that were found for its methods."""

import math
from collections.abc import Sequence
from pathlib import Path

import rates
from cells import Cell
from environments import Environment
from methods import Method, methods

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

FACTORS = (0.316, 1.0, 3.16)  # the grid, around the centre of a method
SEEDS = (1, 2, 3)
TUNING = 101  # the seed that rates are chosen on, with a split of its own
TIMED = 12  # steps of a run that is timed; of LISA, draws
PROBED = 16  # batches of a probe


class Plan:
    """All runs of one task.

    Parameters
    ----------
    task
        One of `methods.tasks`.
    kept
        Folder of the study's logs.
    """

    def __init__(self, task: Environment, kept: Path) -> None:
        self.task, self.kept = task, kept
        self.methods = {
            method.name: method
            for method in methods(task, lambda seed: kept / self.probe(seed + 1).name)
        }

    def cells(self) -> list[Cell]:
        """Return what is to be run as far as the logs at hand tell it, timing aside."""
        found = [self.probe(seed + 1) for seed in (*SEEDS, TUNING)]
        for method in self.methods.values():
            found += [self.cell(method, TUNING, rate) for rate in self.tried(method)]
        found += [
            self.cell(method, seed)
            for seed in SEEDS
            for method in self.methods.values()
            if self.rate(method) is not None
        ]
        return found

    def settled(self) -> bool:
        """Whether the rate of every method is known."""
        return all(self.rate(method) is not None for method in self.methods.values())

    # --- runs ------------------------------------------------------------------------------------

    def cell(self, method: Method, seed: int, rate: float | None = None) -> Cell:
        """Return one run of a method; at a rate of the grid, or at the method's."""
        name = f"{self.task.name}/{method.name}/s{seed}"
        if rate is not None:
            name = f"{self.task.name}/rates/{method.name}-{rate:.3g}"

        def words() -> list[str]:
            used = self.rate(method) if rate is None else rate
            if used is None:
                raise LisaError(f"{name}: the rates of {method.name} are not complete.")
            return [
                *self._data(seed), *method.words(seed), f"--learning_rate={used:.6g}",
                f"--dataset_test_split={'test' if rate is None else 'validation'}",
                *self._steps(self.task.steps), f"--eval_steps={self.task.steps}",
                f"--max_eval_samples={self.task.evaluated}",
                # What stands before training is the same under every method.
                f"--eval_on_start={str(method.name == 'full').lower()}",
            ]  # fmt: skip

        after = (self.probe(seed + 1).name,) if method.probed else ()
        return Cell(name, words, after)

    def probe(self, seed: int) -> Cell:
        """Return the probe that the runs of the seed before read."""

        def words() -> list[str]:
            return [*self._data(seed), "--method=probe", f"--probe.batches={PROBED}"]

        return Cell(f"{self.task.name}/source-probe/s{seed}", words)

    def timed(self, method: Method) -> Cell:
        """Return a short run for seconds and memory, to be run alone on an idle machine."""
        # What a step of LISA takes depends on the layers.
        steps = TIMED * (self.task.interval if method.name == "lisa" else 1)

        def words() -> list[str]:
            return [
                *self._data(SEEDS[0]), *method.words(SEEDS[0]), *self._steps(steps),
                f"--learning_rate={method.centre:.6g}", "--dataset_test_split=validation",
                "--max_eval_samples=16", f"--eval_steps={steps}",
            ]  # fmt: skip

        after = (self.probe(SEEDS[0] + 1).name,) if method.probed else ()
        return Cell(f"{self.task.name}/timed/{method.name}", words, after)

    def _data(self, seed: int) -> list[str]:
        task = self.task
        return [
            f"--model_name_or_path={task.model()}", f"--dataset_name={task.data()}",
            f"--seed={seed}", f"--per_device_train_batch_size={task.batch}", *task.words,
        ]  # fmt: skip

    @staticmethod
    def _steps(steps: int) -> list[str]:
        return [
            f"--max_steps={steps}", "--lr_scheduler_type=cosine", "--warmup_steps=0.05",
            "--logging_steps=10", f"--record.every={steps}", "--record.flush_seconds=3600",
        ]  # fmt: skip

    # --- rates -----------------------------------------------------------------------------------

    def tried(self, method: Method) -> list[float]:
        """Return the rates of a method's grid, moved on where the best stands at an edge."""
        return rates.tried(method.centre, FACTORS, lambda grid: self.losses(method, grid))

    def losses(self, method: Method, grid: Sequence[float]) -> dict[float, float] | None:
        """Return the tuning loss at every rate; None where one is not finished yet."""
        found = {rate: self.loss(self.cell(method, TUNING, rate).name) for rate in grid}
        known = {rate: loss for rate, loss in found.items() if loss is not None}
        return known if len(known) == len(found) else None

    def rate(self, method: Method) -> float | None:
        """Return the rate of the grid with the lowest tuning loss; None until it is complete."""
        losses = self.losses(method, self.tried(method))
        return min(losses, key=losses.__getitem__) if losses is not None else None

    def loss(self, name: str) -> float | None:
        """Return the held-out loss after the last step; infinite where it is not a number."""
        folder = self.kept / name
        if not folder.exists():
            return None
        found = la.load(folder).manifest["result"]["last_held_out_loss"]
        return float(found) if found is not None and math.isfinite(found) else math.inf
