"""What the arms are, in words of `lisa-train`."""

import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from environments import Environment

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.multipliers_file import SCHEMA

TUNING = (101, 102)
RANK = 16
SHARP = 3.0  # strength of `strong` and of what is compared with it
RANDOM = 3
LEARNERS = {  # of which the pilot stage chooses one for `online`; all at the strength of `strong`
    "grad_rms": ("--lisa.learn.metric=grad_rms",),
    "l1_descent": ("--lisa.learn.metric=l1_descent",),
    "kl": ("--lisa.learn.metric=grad_rms", "--lisa.learn.learner=kl"),
    "probe": ("--lisa.learn.metric=probe",),
}
LEARNED = ("default", "strong", "pool", "pilot", "ablation", "online")
CARRYING = (  # the arms of environments that do not get the whole matrix
    "lora-probe", *(f"lora-random-{n}" for n in range(1, RANDOM + 1)), "lora-last", "lora-all",
    "lora-everything", "full", "uniform", "reset", "default", "default-placebo", "strong",
    "strong-placebo", "pool", "pool-placebo", "online", "online-placebo",
)  # fmt: skip


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
    """

    name: str
    family: str
    words: Callable[[int], list[str]]
    sources: tuple[str, ...] = ()
    primary: bool = False


def held_out_loss(folder: Path) -> float | None:
    """Return a run's held-out loss after its last step; infinite where it is not a number.

    None where there is no run.
    """
    return result(folder)["loss"] if folder.exists() else None


@functools.cache
def result(folder: Path) -> dict[str, float]:
    """Return a kept run's held-out loss, and the task's own score by its name."""
    found = la.load(folder).manifest["result"]
    loss = found["last_held_out_loss"]
    finite = loss is not None and math.isfinite(loss)
    scores = found.get("last_held_out_scores") or {}
    return {**scores, "loss": float(loss) if finite else math.inf}


@functools.cache
def profile_of(folder: Path, metric: str) -> la.ImportanceProfile:
    """Return what a kept run says of a metric; such a run does not change any more."""
    return la.importance(la.load(folder), metric)


class Arms:
    """Every arm of one environment.

    Parameters
    ----------
    environment
        Of the arms.
    kept
        Folder of the study's logs, which profiles are read from.
    work
        Folder for files that runs are given.

    Attributes
    ----------
    choices : dict of str to Arm
        Arms of question A by what names the layers.
    every : dict of str to Arm
        All arms by name.
    learners : dict of str to Arm
        The learners of the pilot stage, by name.
    """

    def __init__(self, environment: Environment, kept: Path, work: Path) -> None:
        self.environment, self.kept, self.work = environment, kept, work
        self._ways = self._all_ways()
        self.choices = self._named()
        every = (*self._few(), *self._whole(), *self._lisa())
        self.every = {a.name: a for a in every if environment.whole or a.name in CARRYING}
        self.learners = {arm.name: arm for arm in self._learning()}

    def source(self, kind: str, seed: int) -> str:
        """Return the name of the run that a profile of this kind is read from."""
        return self.run_name(f"source-{kind}", seed)  # `pilot` is the name of an arm

    def run_name(self, arm: str, seed: int) -> str:
        """Return the name of the run of an arm, or of what is read, of one seed."""
        return f"{self.environment.name}/{arm}/s{seed}"

    # --- question A ------------------------------------------------------------------------------

    def chosen(self, way: str, seed: int) -> list[int] | None:
        """Return the layers that a way of question A names; None where its source is missing."""
        layers, sources = self._ways[way]
        if not all((self.kept / self.source(kind, seed + 1)).exists() for kind in sources):
            return None
        return layers(seed)

    def _all_ways(self) -> dict[str, tuple[Callable[[int], list[int]], tuple[str, ...]]]:
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
            for way, (layers, sources) in self._ways.items():
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
        if kind == "spectrum":
            return self._spectrum
        metric = {"probe": "grad_signal", "pilot": "grad_rms", "ablation": "ablation_keep"}[kind]
        return profile_of(self.kept / self.source(kind, seed + 1), metric)

    @functools.cached_property
    def _spectrum(self) -> la.ImportanceProfile:
        """Of the weights alone, the same whatever the seed; kept, so the page needs no model."""
        file = self.kept / self.environment.name / "spectrum.json"
        if not file.exists():
            found = la.importance(la.load(self.environment.model()), "spectrum_snr")
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(found, model=Path(found.model).name).save(file)  # no folder of this machine
        return la.ImportanceProfile.load(file)

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
            Arm("lora-all", "lora-low", lambda seed: self._lora(every, low)),
            Arm("weights-everything", "weights-all", lambda seed: self._only("weights", every)),
            Arm("full", "full", lambda seed: ["--method=full"], primary=True),
            Arm("level", "full", self._level, ("pilot",)),
        ]
        if environment.head:
            words = ["--method=select", "--select.groups=[head]"]
            arms.append(Arm("head", "head", lambda seed: words))
        return arms

    def _level(self, seed: int) -> list[str]:
        """Words of full training in which every layer moves by the same share of its weights."""
        moved = profile_of(self.kept / self.source("pilot", seed + 1), "delta_rel")
        inverse = [1 / score for score in moved.scores]
        mean = sum(inverse) / len(inverse)
        file = self._file("level", seed)
        record = {
            "schema": SCHEMA, "layer_names": [row.name for row in moved],
            "multipliers": {str(i): value / mean for i, value in enumerate(inverse)},
        }  # fmt: skip
        file.write_text(json.dumps(record), encoding="utf-8")
        return ["--method=full", f"--lr_multipliers={file}"]

    # --- question B ------------------------------------------------------------------------------

    def _lisa(self) -> list[Arm]:
        drawn, lisa = self.environment.drawn, self._drawn

        def of(kind: str, strength: float | str, control: str = "none") -> Callable[..., list[str]]:
            def words(seed: int) -> list[str]:
                # Of few layers a probe may name none: then the default is uniform, as a user gets
                # it, and the stronger arms take the scores as they are.
                probabilities = la.sampling_probabilities(
                    self.profile(kind, seed),
                    drawn,
                    strength=strength,
                    use_intervals=strength == 1.0,
                )
                file = self._file(f"{kind}-{strength}", seed)
                probabilities.save(file)
                return lisa(f"--lisa.probabilities={file}", f"--lisa.control={control}")

            return words

        pool = f"pool={max(self.environment.few * len(self.environment.stacks), 2 * drawn)}"
        placebo = "--lisa.control=permuted"
        static = (  # name, family, what it is read from, strength, primary
            ("default", "mild", "probe", 1.0, True),
            ("strong", "strong", "probe", SHARP, True),
            ("pool", "strong", "probe", pool, True),
            ("pilot", "strong", "pilot", SHARP, False),
            ("ablation", "strong", "ablation", SHARP, False),
        )
        arms = [
            Arm("uniform", "mild", lambda seed: lisa(), primary=True),
            Arm("iid", "mild", lambda seed: lisa(sampling="uniform")),
            Arm("reset", "mild", lambda seed: lisa(state="reset")),
            Arm("online", "strong", self._online, primary=True),
            Arm("online-placebo", "strong", lambda s: [*self._online(s), placebo], primary=True),
            Arm("reversed", "strong", of("probe", SHARP, "reversed"), ("probe",)),
        ]
        for name, family, kind, strength, primary in static:
            arms.append(Arm(name, family, of(kind, strength), (kind,), primary))
            words = of(kind, strength, "permuted")
            arms.append(Arm(f"{name}-placebo", family, words, (kind,), primary))
        return arms

    def _drawn(self, *words: str, sampling: str = "balanced", state: str = "keep") -> list[str]:
        return [
            "--method=lisa", f"--lisa.activated_layers={self.environment.drawn}",
            f"--lisa.interval_steps={self.environment.interval}",
            f"--lisa.sampling={sampling}", f"--lisa.optimizer_state={state}", *words,
        ]  # fmt: skip

    def _learning(self) -> list[Arm]:
        """Learners that the pilot stage compares."""
        strength = f"--lisa.learn.strength={SHARP:g}"
        return [
            Arm(f"learner-{name}", "strong", lambda seed, w=words: self._drawn(*w, strength))
            for name, words in LEARNERS.items()
        ]

    def preferred(self) -> str | None:
        """Return the learner with the lowest mean loss on the tuning split; None as yet."""
        found = {}
        for name in self.learners:
            losses = [held_out_loss(self.kept / self.run_name(name, seed)) for seed in TUNING]
            finished = [loss for loss in losses if loss is not None]
            if len(finished) < len(losses):
                return None
            found[name] = sum(finished) / len(finished)
        return min(found, key=found.__getitem__)

    def _online(self, seed: int) -> list[str]:
        name = self.preferred()
        if name is None:
            raise LisaError(f"{self.environment.name}: the learners are not compared yet.")
        return self.learners[name].words(seed)

    def _file(self, name: str, seed: int) -> Path:
        folder = self.work / "files" / self.environment.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-s{seed}.json"
