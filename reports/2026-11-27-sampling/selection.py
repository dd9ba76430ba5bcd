"""Question A: the layers that train throughout; and full training, which arms are held against."""

import random
from collections.abc import Callable, Sequence

from arms import RANDOM, Arm
from sources import Sources

RANK = 16


class Selection:
    """Arms in which the same layers train throughout.

    Parameters
    ----------
    sources
        What names layers.

    Attributes
    ----------
    choices : dict of str to Arm
        Arms by what names the layers.
    arms : list of Arm
        Those that are run, and the ones of all layers.
    """

    def __init__(self, sources: Sources) -> None:
        self.environment, self.sources = sources.environment, sources
        self._ways = self._all_ways()
        self.choices = self._named()
        self.arms = [*self._few(), *self._whole()]

    def chosen(self, way: str, seed: int) -> list[int] | None:
        """Return the layers that a way names; None where its source is missing."""
        layers, kinds = self._ways[way]
        return layers(seed) if all(self.sources.there(k, seed + 1) for k in kinds) else None

    def _all_ways(self) -> dict[str, tuple[Callable[[int], list[int]], tuple[str, ...]]]:
        """What names the layers of question A, and the runs that it reads."""
        ways: dict[str, tuple[Callable[[int], list[int]], tuple[str, ...]]] = {
            "probe": (lambda seed: self.sources.top("probe", seed), ("probe",)),
            "pilot": (lambda seed: self.sources.top("pilot", seed), ("pilot",)),
            "ablation": (lambda seed: self.sources.top("ablation", seed), ("ablation",)),
            "last": (lambda seed: self.environment.top(self._places()), ()),
            "even": (lambda seed: self._even(), ()),
            "lowest": (lambda seed: self.sources.top("probe", seed, lowest=True), ("probe",)),
            "spectrum": (lambda seed: self.sources.top("spectrum", seed), ()),
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
        moved = self.sources.metric("pilot", seed, "delta_rel")
        inverse = [1 / score for score in moved.scores]
        mean = sum(inverse) / len(inverse)
        word = self.sources.multipliers("level", seed, [each / mean for each in inverse])
        return ["--method=full", "--record.base_delta=true", word]
