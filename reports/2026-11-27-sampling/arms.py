"""What the arms are, in words of `lisa-train`, and the rates that were found for them."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import Cell
from environments import RATES, Environment

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

TUNING = (101, 102)
RANK = 16
PROBED = 16  # batches of a probe
SHARP = 3.0  # strength of `strong` and of what is compared with it
RANDOM = 3
PAIRS = {  # family -> profile arm and placebo by which its rate is chosen
    "lora-few": ("lora-probe", "lora-random-1"),
    "weights-few": ("weights-probe", "weights-random-1"),
    "mild": ("default", "uniform"),
    "strong": ("strong", "strong-placebo"),
}
EXTENSIONS = 3  # how often a grid whose best rate stands at its edge is moved on


@dataclass(frozen=True)
class Arm:
    """One thing to do with the layers.

    Parameters
    ----------
    name
        As in DESIGN.md.
    family
        Whose learning rate it has.
    words
        Gives the words of `lisa-train` for a seed.
    sources
        Kinds of earlier runs that it reads, of the next seed: probe, pilot, ablation.
    primary
        Whether it is in a primary contrast.
    learned
        Whether it is one of the learned arms of question B, of which the best is chosen.
    """

    name: str
    family: str
    words: Callable[[int], list[str]]
    sources: tuple[str, ...] = ()
    primary: bool = False
    learned: bool = False


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
        self.environment, self.kept, self.work = environment, kept, work
        self.ways = self._ways()
        self.choices = self._named()
        self.arms = {arm.name: arm for arm in (*self._few(), *self._whole(), *self._lisa())}

    def settled(self) -> bool:
        """Whether the rate of every family is known."""
        return all((self.kept / cell.name).exists() for cell in self._grids())

    def _grids(self) -> list[Cell]:
        return [
            cell
            for family in self.families
            for rate in self.tried(family)
            for cell in self._tuning(family, rate)
        ]

    def cells(self) -> list[Cell]:
        """Return what is to be run as far as the logs at hand tell it."""
        tuning = self._grids()
        probes = [self.source("probe", seed + 1) for seed in (*self.seeds, *TUNING)]
        if not self.settled():
            return [*probes, *tuning]
        final = [
            self.cell(arm, seed)
            for arm in self.arms.values()
            for seed in range(1, self._seeds(arm) + 1)
        ]
        chosen = [
            self.cell(arm, seed) for arm in self.arms.values() if arm.learned for seed in TUNING
        ]
        every = [*probes, *tuning, *final, *chosen]
        named = {cell.name for cell in every}
        kinds = ("pilot", "ablation")
        needed = {name for cell in every for name in cell.after} - named
        sources = [
            cell
            for kind in kinds
            for seed in (*self.seeds, *TUNING)
            if (cell := self.source(kind, seed + 1)).name in needed
        ]
        return [*sources, *every]

    # --- what is run -----------------------------------------------------------------------------

    @property
    def families(self) -> list[str]:
        """Families with a rate of their own."""
        return list(dict.fromkeys(arm.family for arm in self.arms.values()))

    @property
    def seeds(self) -> range:
        """Seeds of the final runs; what they read are runs of the next seed."""
        return range(1, self.environment.seeds + 1)

    def _seeds(self, arm: Arm) -> int:
        return self.environment.seeds if arm.primary else self.environment.secondary

    def cell(self, arm: Arm, seed: int, rate: float | None = None) -> Cell:
        """Return one run of an arm; at a rate of the grid, or at the family's."""
        tuned = seed in TUNING
        name = f"{self.environment.name}/{arm.name}/s{seed}"
        if rate is not None:
            name = f"{self.environment.name}/rates/{arm.name}-{rate:.3g}-s{seed}"

        def words() -> list[str]:
            return [
                *self._common("validation" if tuned else "test", seed),
                f"--learning_rate={self.rate(arm.family) if rate is None else rate:.6g}",
                *arm.words(seed),
            ]

        after = tuple(self.source(kind, seed + 1).name for kind in arm.sources)
        ablated = None
        if arm.name == "lora-everything" and rate is None:
            ablated = ("--max_examples", "64", "--general", "none")
        return Cell(name, words, after, ablated)

    def source(self, kind: str, seed: int) -> Cell:
        """Return the run that a profile of this kind is read from."""
        if kind == "ablation":
            return self.cell(self.arms["lora-everything"], seed)
        environment = self.environment

        def words() -> list[str]:
            if kind == "probe":
                return [*self._common("test", seed, trains=False), "--method=probe",
                        f"--probe.batches={PROBED}", "--record.every=1"]  # fmt: skip
            steps = math.ceil(environment.steps / 4)
            return [
                *self._common("test", seed, steps=steps, every=1), "--method=full",
                f"--learning_rate={self.rate('full'):.6g}",
            ]  # fmt: skip

        return Cell(f"{environment.name}/{kind}/s{seed}", words)

    def _common(
        self,
        split: str,
        seed: int,
        *,
        steps: int | None = None,
        every: int | None = None,
        trains: bool = True,
    ) -> list[str]:
        environment = self.environment
        steps = environment.steps if steps is None else steps
        words = [
            f"--model_name_or_path={environment.model()}",
            f"--dataset_name={environment.data()}", f"--seed={seed}",
            f"--per_device_train_batch_size={environment.batch}", *environment.words,
        ]  # fmt: skip
        if trains:
            words += [
                f"--dataset_test_split={split}", f"--max_steps={steps}",
                "--lr_scheduler_type=cosine", "--warmup_steps=0.05",
                f"--eval_steps={math.ceil(steps / 3)}", "--logging_steps=10",
                f"--record.every={every or steps}", "--record.flush_seconds=3600",
            ]  # fmt: skip
        return words

    # --- rates -----------------------------------------------------------------------------------

    def tried(self, family: str) -> list[float]:
        """Return the rates of a family's grid, moved on where the best stands at an edge."""
        rates = [self.environment.centres[family] * factor for factor in RATES]
        for _ in range(EXTENSIONS):
            losses = self.losses(family, rates)
            if losses is None:
                break
            best = min(losses, key=losses.__getitem__)
            if best == rates[-1]:
                rates.append(best * RATES[1] / RATES[0])
            elif best == rates[0]:
                rates.insert(0, best * RATES[0] / RATES[1])
            else:
                break
        return rates

    def losses(self, family: str, rates: Sequence[float]) -> dict[float, float] | None:
        """Return the mean tuning loss at every rate; None where one is not finished yet."""
        found = {}
        for rate in rates:
            values = [self.loss(cell.name) for cell in self._tuning(family, rate)]
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
        losses = self.losses(family, self.tried(family))
        if losses is None:
            raise LisaError(f"{self.environment.name}: the rates of {family} are not complete.")
        return min(losses, key=losses.__getitem__)

    def loss(self, name: str) -> float | None:
        """Return the held-out loss after the last step; infinite where it is not a number."""
        folder = self.kept / name
        if not folder.exists():
            return None
        found = la.load(folder).manifest["result"]["last_held_out_loss"]
        return float(found) if found is not None and math.isfinite(found) else math.inf

    def _tuning(self, family: str, rate: float) -> list[Cell]:
        """Cells of one rate: a profile arm and its placebo, or the family's first arm."""
        pair = PAIRS.get(family)
        if pair is None:
            only = next(arm for arm in self.arms.values() if arm.family == family)
            return [self.cell(only, seed, rate) for seed in TUNING]
        both = [self.choices[name] if name in self.choices else self.arms[name] for name in pair]
        if self.environment.both_tuned:
            return [self.cell(arm, seed, rate) for arm in both for seed in TUNING]
        return [self.cell(arm, seed, rate) for arm, seed in zip(both, TUNING, strict=True)]

    # --- question A ------------------------------------------------------------------------------

    def chosen(self, way: str, seed: int) -> list[int] | None:
        """Return the layers that a way of question A names; None where its source is missing."""
        layers, sources = self.ways[way]
        if not all((self.kept / self.source(kind, seed + 1).name).exists() for kind in sources):
            return None
        return layers(seed)

    def _ways(self) -> dict[str, tuple[Callable[[int], list[int]], tuple[str, ...]]]:
        """What names the layers of question A, and the runs that it reads."""
        ways: dict[str, tuple[Callable[[int], list[int]], tuple[str, ...]]] = {
            "probe": (lambda seed: self.top("probe", seed), ("probe",)),
            "pilot": (lambda seed: self.top("pilot", seed), ("pilot",)),
            "ablation": (lambda seed: self.top("ablation", seed), ("ablation",)),
            "last": (lambda seed: self.environment.top(self._places()), ()),
            "even": (lambda seed: self._even(), ()),
            "lowest": (lambda seed: self.top("probe", seed, lowest=True), ("probe",)),
            "spectrum": (lambda seed: self.top("spectrum", seed), ()),
        }
        for number in range(1, RANDOM + 1):
            ways[f"random-{number}"] = (lambda seed, n=number: self._random(seed, n), ())
        return ways

    def _named(self) -> dict[str, Arm]:
        """Arms of question A by what names the layers."""
        found = {}
        for kind in ("lora", "weights"):
            for way, (layers, sources) in self.ways.items():
                arm = Arm(
                    f"{kind}-{way}", f"{kind}-few",
                    lambda seed, k=kind, choose=layers: self._only(k, choose(seed)),
                    sources, primary=way == "probe" or way.startswith("random"),
                )  # fmt: skip
                found[arm.name] = arm
        return found

    def _few(self) -> list[Arm]:
        if not self.environment.every_layer:
            return list(self.choices.values())
        return [
            Arm(
                f"{kind}-layer-{i}", f"{kind}-few",
                lambda seed, k=kind, layer=i: self._only(k, [layer]), primary=True,
            )
            for kind in ("lora", "weights")
            for i in range(self.environment.layers)
        ]  # fmt: skip

    def _only(self, kind: str, layers: Sequence[int]) -> list[str]:
        """Words that train some layers alone, and a new head."""
        if kind == "lora":
            return self._lora(layers, RANK)
        groups = ["--select.groups=[head]"] if self.environment.head else []
        return ["--method=select", f"--select.layers={','.join(map(str, layers))}", *groups]

    def _lora(self, layers: Sequence[int], rank: int) -> list[str]:
        return [
            "--method=lora", f"--lora.r={rank}", f"--lora.lora_alpha={2 * rank}",
            f"--lora.target_modules={self.environment.targets(layers)}",
        ]  # fmt: skip

    def top(self, kind: str, seed: int, *, lowest: bool = False) -> list[int]:
        """Return the layers that stand highest in a profile of the next seed."""
        return self.environment.top(list(self.profile(kind, seed).scores), lowest=lowest)

    def profile(self, kind: str, seed: int) -> la.ImportanceProfile:
        """Return the profile that an arm of a seed uses: of the next seed's run."""
        if kind == "spectrum":  # of the weights alone: the same whatever the seed
            return la.importance(la.load(self.environment.model()), "spectrum_snr")
        metric = {"probe": "grad_signal", "pilot": "grad_rms", "ablation": "ablation_keep"}[kind]
        return la.importance(la.load(self.kept / self.source(kind, seed + 1).name), metric)

    def _places(self) -> list[float]:
        return [float(i) for i in range(self.environment.layers)]

    def _even(self) -> list[int]:
        few, chosen, first = self.environment.few, [], 0
        for _, size in self.environment.stacks:
            chosen += [first + int((j + 0.5) * size / few) for j in range(few)]
            first += size
        return chosen

    def _random(self, seed: int, number: int) -> list[int]:
        draw = random.Random(f"{self.environment.name} {seed} {number}")
        return self.environment.top([draw.random() for _ in range(self.environment.layers)])

    # --- all layers ------------------------------------------------------------------------------

    def _whole(self) -> list[Arm]:
        environment = self.environment
        every = range(environment.layers)
        share = environment.few * len(environment.stacks) / environment.layers
        low = max(1, round(RANK * share))
        arms = [
            Arm("lora-everything", "lora-all", lambda seed: self._lora(every, RANK), primary=True),
            Arm("lora-all", "lora-all", lambda seed: self._lora(every, low)),
            Arm("full", "full", lambda seed: ["--method=full"], primary=True),
            Arm("level", "full", self._level, ("pilot",)),
        ]
        if environment.head:
            words = ["--method=select", "--select.groups=[head]"]
            arms.append(Arm("head", "head", lambda seed: words))
        return arms

    def _level(self, seed: int) -> list[str]:
        """Words of full training in which every layer moves by the same share of its weights."""
        pilot = la.load(self.kept / self.source("pilot", seed + 1).name)
        moved = la.importance(pilot, "delta_rel")
        inverse = la.ImportanceProfile.from_scores(
            [1 / score for score in moved.scores], names=[row.name for row in moved],
            metric="1 / delta_rel", definition="What a layer's rate takes to move alike.",
            model=pilot.manifest["model"]["name"], sources=moved.sources,
        )  # fmt: skip
        file = self._file("level", seed)
        la.export(inverse, "lr", use_intervals=False, floor=0.0, cap=100.0, mix=0.0).save(file)
        return ["--method=full", f"--lr_multipliers={file}"]

    # --- question B ------------------------------------------------------------------------------

    def _lisa(self) -> list[Arm]:
        drawn = self.environment.drawn

        def lisa(*words: str, sampling: str = "balanced") -> list[str]:
            return [
                "--method=lisa", f"--lisa.activated_layers={drawn}",
                f"--lisa.interval_steps={self.environment.interval}",
                f"--lisa.sampling={sampling}", *words,
            ]  # fmt: skip

        def of(kind: str, strength: float | str, control: str = "none") -> Callable[..., list[str]]:
            def words(seed: int) -> list[str]:
                probabilities = la.sampling_probabilities(
                    self.profile(kind, seed), drawn, strength=strength
                )
                file = self._file(f"{kind}-{strength}", seed)
                probabilities.save(file)
                return lisa(f"--lisa.probabilities={file}", f"--lisa.control={control}")

            return words

        learn = ("--lisa.learn.metric=grad_rms",)
        placebo = "--lisa.control=permuted"
        return [
            Arm("uniform", "mild", lambda seed: lisa(), primary=True),
            Arm("iid", "mild", lambda seed: lisa(sampling="uniform")),
            Arm("default", "mild", of("probe", 1.0), ("probe",), primary=True, learned=True),
            Arm("online", "mild", lambda seed: lisa(*learn), primary=True, learned=True),
            Arm("online-placebo", "mild", lambda seed: lisa(*learn, placebo)),
            Arm("strong", "strong", of("probe", SHARP), ("probe",), primary=True, learned=True),
            Arm("strong-placebo", "strong", of("probe", SHARP, "permuted"), ("probe",), True),
            Arm("pool", "strong", of("probe", "pool"), ("probe",), primary=True, learned=True),
            Arm("pool-placebo", "strong", of("probe", "pool", "permuted"), ("probe",), True),
            Arm("reversed", "strong", of("probe", SHARP, "reversed"), ("probe",)),
            Arm("pilot", "strong", of("pilot", SHARP), ("pilot",), learned=True),
            Arm("ablation", "strong", of("ablation", SHARP), ("ablation",), learned=True),
        ]

    def _file(self, name: str, seed: int) -> Path:
        folder = self.work / "files" / self.environment.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-s{seed}.json"
