"""What is run of an environment, in which order, and the rates that were found for its arms."""

import math
from collections.abc import Sequence
from pathlib import Path

import rates
from arms import CARRYING, LEARNED, TUNING, Arm
from cells import Cell
from environments import RATES, Environment
from sampling import Sampling
from seconds import FEW, TIMED, steps_left
from selection import Selection
from settings import ABLATED, PROBED, common
from sources import Sources, held_out_loss

from lisa_analysis.contract.errors import LisaError

LONGER = 4  # times the steps, for the primary contrasts of some environments
LONGER_SEEDS = (1, 2, 3)
IF_BEST = ("default-placebo", "pilot-placebo", "ablation-placebo")  # else not in the design
SHORTER = ("strong", "full")  # run for the time of `uniform`, beside the best learned arm
PAIRS = {  # family -> profile arm and placebo by which its rate is chosen
    "lora-few": ("lora-probe", "lora-random-1"),
    "weights-few": ("weights-probe", "weights-random-1"),
    "mild": ("default", "uniform"),
    "strong": ("strong", "strong-placebo"),
    "parts": ("pool-parts", "uniform-parts"),
}


class Plan:
    """All cells of one environment.

    Parameters
    ----------
    environment
        Of the arms.
    kept
        Folder of the study's logs.
    work
        Folder for files that runs are given.
    """

    def __init__(self, environment: Environment, kept: Path, work: Path) -> None:
        self.environment, self.kept = environment, kept
        self.sources = Sources(environment, kept, work)
        self.selection, self.sampling = Selection(self.sources), Sampling(self.sources)
        every = {arm.name: arm for arm in (*self.selection.arms, *self.sampling.arms)}
        whole = environment.whole
        self.arms = {name: arm for name, arm in every.items() if whole or name in CARRYING}
        self._rates: dict[str, float] = {}  # of families whose grid is complete

    def settled(self) -> bool:
        """Whether the rate of every family is known."""
        return all((self.kept / c.name).exists() for f in self.families for c in self._grid(f))

    def _grid(self, family: str) -> list[Cell]:
        return [cell for rate in self.tried(family) for cell in self.pair(family, rate)]

    def cells(self) -> list[Cell]:
        """Return what is to be run as far as the logs at hand tell it."""
        tuning = [cell for family in self.families for cell in self._grid(family)]
        probes = [self.source("probe", seed + 1) for seed in (*self.seeds, *TUNING)]
        if not self.settled():
            return [*probes, *tuning]
        learners = [
            self.cell(arm, seed) for arm in self.sampling.learners.values() for seed in TUNING
        ]
        arms = [arm for arm in self._asked() if self.preferred or "online" not in arm.name]
        learned = [arm for arm in arms if arm.name in LEARNED]
        chosen = [self.tuned(arm, seed) for arm in learned for seed in TUNING]
        final = [  # seed by seed: where a run of the plan stops, every arm has as many
            self.cell(arm, seed) for seed in self.seeds for arm in arms if seed <= self._seeds(arm)
        ]
        starts = [self.source("start", seed) for seed in self.seeds]
        every = [*probes, *tuning, *learners, *chosen, *final, *self._longer(), *self._shorter(),
                 *starts, *self._by_part()]  # fmt: skip
        every = list({cell.name: cell for cell in every}.values())
        named = {cell.name for cell in every}
        kinds = ("pilot", "ablation")
        needed = {name for cell in every for name in cell.after} - named
        if self.environment.every_layer:  # there what a source names is a look-up
            needed |= {self.sources.name(kind, s + 1) for kind in kinds for s in self.seeds}
            needed -= named
        sources = [
            cell
            for kind in kinds
            for seed in (*self.seeds, *TUNING)
            if (cell := self.source(kind, seed + 1)).name in needed
        ]
        return [*sources, *every]

    @property
    def preferred(self) -> str | None:
        """The learner that the pilot stage prefers; None as yet."""
        return self.sampling.preferred()

    def best_learned(self) -> str | None:
        """Return the learned arm with the lowest mean loss on the tuning split; None as yet."""
        found = {}
        for name in (name for name in LEARNED if name in self.arms):
            if self.preferred is None:
                return None
            values = [self.loss(self.tuned(self.arms[name], seed).name) for seed in TUNING]
            finished = [value for value in values if value is not None]
            if len(finished) < len(values):
                return None
            found[name] = sum(finished) / len(finished)
        return min(found, key=found.__getitem__)

    def longer_arms(self) -> list[Arm]:
        """Return the arms that run at four times the steps, as far as they are known."""
        if not self.environment.longer:
            return []
        best = self.best_learned()
        names = ["lora-probe", *(n for n in self.arms if "lora-random" in n), "uniform"]
        return [self.arms[name] for name in (*names, *([best] if best else []))]

    def _longer(self) -> list[Cell]:
        return [
            self.cell(arm, seed, times=LONGER)
            for seed in LONGER_SEEDS
            for arm in self.longer_arms()
        ]

    def _by_part(self) -> list[Cell]:
        """What is explored: where the head is new rates that know of the head's, then the arms."""
        arms = self.sampling.by_part.values()
        grid = self._grid("parts") if self.environment.head else []
        if grid and self.losses("parts", self.tried("parts")) is None:
            return grid
        seeds = range(1, self.environment.secondary + 1)
        return [*grid, *(self.cell(arm, seed) for seed in seeds for arm in arms)]

    def shorter_arms(self) -> list[Arm]:
        """Return the arms that run anew for the time of `uniform`, as far as they are known."""
        best = self.best_learned()
        names = dict.fromkeys([*SHORTER, *([best] if best else [])])
        return [self.arms[name] for name in names]

    def _asked(self) -> list[Arm]:
        """Arms of the design, which of some placebos has that of the best learned arm alone."""
        best = self.best_learned()
        every = self.arms.values()
        return [arm for arm in every if arm.name not in IF_BEST or arm.name == f"{best}-placebo"]

    def timed_arms(self) -> list[Arm]:
        """Return the arms whose seconds are asked for: question B's and anchors."""
        few = ("lora-", "weights-")
        named = [arm for arm in self._asked() if not arm.name.startswith(few)]
        return [*named, self.arms["lora-everything"]]

    def shorter(self, arm: Arm, seed: int) -> Cell | None:
        """Return the run of an arm for the time of `uniform`; None without time for a step."""
        steps = steps_left(self, arm)
        return self.cell(arm, seed, steps=steps) if steps else None

    def _shorter(self) -> list[Cell]:
        cells = [
            self.shorter(arm, seed)
            for seed in range(1, self.environment.secondary + 1)
            for arm in self.shorter_arms()
        ]
        return [cell for cell in cells if cell is not None]

    # --- what is run -----------------------------------------------------------------------------

    @property
    def families(self) -> list[str]:
        """Families with a rate of their own."""
        return list(dict.fromkeys(arm.family for arm in self.arms.values()))

    @property
    def pilot_steps(self) -> int:
        """Steps of a pilot."""
        return math.ceil(self.environment.steps / 4)

    @property
    def seeds(self) -> range:
        """Seeds of the final runs; what they read are runs of the next seed."""
        return range(1, self.environment.seeds + 1)

    def _seeds(self, arm: Arm) -> int:
        best = self.best_learned()
        primary = arm.primary or arm.name in (best, f"{best}-placebo")
        return self.environment.seeds if primary else self.environment.secondary

    def tuned(self, arm: Arm, seed: int) -> Cell:
        """Return the run of an arm on the tuning split at its family's rate.

        Where the grid has it already, that one.
        """
        rate = self.rate(arm.family)
        inside = {cell.name for cell in self.pair(arm.family, rate)}
        cell = self.cell(arm, seed, rate)
        return cell if cell.name in inside else self.cell(arm, seed)

    def cell(
        self,
        arm: Arm,
        seed: int,
        rate: float | None = None,
        times: int = 1,
        steps: int | None = None,
    ) -> Cell:
        """Return one run of an arm; at a rate of the grid or at the family's, and so long."""
        tuned = seed in TUNING
        name = self.sources.run(arm.name, seed)
        if rate is not None:
            name = f"{self.environment.name}/rates/{arm.name}-{rate:.3g}-s{seed}"
        elif times > 1:
            name = f"{self.environment.name}/longer/{arm.name}-s{seed}"
        elif steps is not None:
            name = f"{self.environment.name}/shorter/{arm.name}-{steps}-s{seed}"
        made = times * self.environment.steps if steps is None else steps

        def words() -> list[str]:
            own = self.rate(arm.family) if rate is None else rate
            return [
                *common(
                    self.environment,
                    "validation" if tuned else "test",
                    seed,
                    steps=made,
                    evaluations=1 if tuned else self.environment.evaluations,
                ),
                f"--learning_rate={own:.6g}",
                *arm.words(seed),
                *([self._of_head(own, seed)] if arm.head_apart else []),
            ]

        after = tuple(self.sources.name(kind, seed + 1) for kind in arm.sources)
        return Cell(name, words, after)

    def _of_head(self, rate: float, seed: int) -> str:
        """Return the word that gives a new head the rate of `head` where all else has another."""
        factor = self.rate("head") / rate
        alike = [1.0] * self.environment.layers
        return self.sources.multipliers(f"head-{factor:.4g}", seed, alike, {"head": factor})

    def timed(self, arm: Arm) -> Cell:
        """Return a short run of an arm for its seconds, to be made alone on an idle machine."""
        seed = self.seeds[0]

        def words() -> list[str]:
            return [
                *common(self.environment, "validation", seed, steps=TIMED, evaluations=2),
                *arm.words(seed), f"--max_eval_samples={FEW}",
                f"--learning_rate={self.environment.centres[arm.family]:.6g}",
            ]  # fmt: skip

        after = tuple(self.sources.name(kind, seed + 1) for kind in arm.sources)
        name = f"{self.environment.name}/timed/{arm.name}"
        return Cell(name, words, after, ABLATED if arm.name == "lora-everything" else None)

    def timed_probe(self) -> Cell:
        """Return a probe made alone on an idle machine."""
        source = self.source("probe", self.seeds[0])
        return Cell(f"{self.environment.name}/timed/source-probe", source.words)

    def source(self, kind: str, seed: int) -> Cell:
        """Return the run that a profile of this kind is read from.

        ``start`` is of no profile: it has the loss before the first step, which all arms of a seed
        share, in a run of its own, since evaluating draws from the generator of dropout.
        """

        def words() -> list[str]:
            if kind == "ablation":  # of examples that are no arm's outcome
                arm = self.arms["lora-everything"]
                return [*common(self.environment, "validation", seed, steps=self.environment.steps),
                        f"--learning_rate={self.rate(arm.family):.6g}",
                        *arm.words(seed)]  # fmt: skip
            if kind == "start":
                return [*common(self.environment, "test", seed, steps=1), "--method=full",
                        "--eval_on_start=true", "--learning_rate=1e-6"]  # fmt: skip
            if kind == "probe":
                return [*common(self.environment, "test", seed, trains=False), "--method=probe",
                        f"--probe.batches={PROBED}", "--record.every=1"]  # fmt: skip
            return [
                *common(self.environment, "test", seed, steps=self.pilot_steps, every=1),
                "--method=full", "--record.base_delta=true",  # what `level` reads
                f"--learning_rate={self.rate('full'):.6g}",
            ]  # fmt: skip

        ablated = ABLATED if kind == "ablation" else None
        return Cell(self.sources.name(kind, seed), words, ablated=ablated)

    # --- rates -----------------------------------------------------------------------------------

    def tried(self, family: str) -> list[float]:
        """Return the rates of a family's grid, moved on where the best stands at an edge."""
        centre = self.environment.centres[family]
        return rates.tried(centre, RATES, lambda grid: self.losses(family, grid))

    def losses(self, family: str, grid: Sequence[float]) -> dict[float, float] | None:
        """Return the mean tuning loss at every rate; None where one is not finished yet."""
        found = {}
        for rate in grid:
            values = [self.loss(cell.name) for cell in self.pair(family, rate)]
            finished = [value for value in values if value is not None]
            if len(finished) < len(values):
                return None
            found[rate] = sum(finished) / len(finished)
        return found

    def rate(self, family: str) -> float:
        """Return the rate of the grid with the lowest mean loss.

        Raises
        ------
        LisaError
            When the grid is not complete.
        """
        if family not in self._rates:
            losses = self.losses(family, self.tried(family))
            if losses is None:
                raise LisaError(f"{self.environment.name}: the rates of {family} are not complete.")
            self._rates[family] = min(losses, key=losses.__getitem__)
        return self._rates[family]

    def loss(self, name: str) -> float | None:
        """Return the held-out loss of a run, see `held_out_loss`."""
        return held_out_loss(self.kept / name)

    def pair(self, family: str, rate: float) -> list[Cell]:
        """Return the cells of a rate: profile arm, then its placebo; or the family's first arm."""
        pair = PAIRS.get(family)
        if pair is None:
            only = next(arm for arm in self.arms.values() if arm.family == family)
            return [self.cell(only, seed, rate) for seed in TUNING]
        every = self.arms | self.selection.choices | self.sampling.by_part
        both = [every[name] for name in pair]
        if self.environment.both_tuned:
            return [self.cell(arm, seed, rate) for arm in both for seed in TUNING]
        return [self.cell(arm, seed, rate) for arm, seed in zip(both, TUNING, strict=True)]
