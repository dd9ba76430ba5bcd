"""Question B: LISA, by what the layers are drawn."""

import functools
from collections.abc import Callable

from arms import TUNING, Arm
from sources import Sources, held_out_loss

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError

SHARP = 3.0  # strength of `strong` and of what is compared with it
LEARNERS = {  # of which the pilot stage chooses one for `online`; all at the strength of `strong`
    "grad_rms": ("--lisa.learn.metric=grad_rms",),
    "l1_descent": ("--lisa.learn.metric=l1_descent",),
    "kl": ("--lisa.learn.metric=grad_rms", "--lisa.learn.learner=kl"),
    "probe": ("--lisa.learn.metric=probe",),
}


class Sampling:
    """Arms of LISA.

    Parameters
    ----------
    sources
        What they draw by.

    Attributes
    ----------
    arms : list of Arm
        Question B's.
    by_part : dict of str to Arm
        What was explored after the results: where the head is new, LISA whose head has a rate of
        its own, whose embedding rests, or both; elsewhere LISA whose embedding and head rest.
    learners : dict of str to Arm
        The learners of the pilot stage, by name.
    """

    def __init__(self, sources: Sources) -> None:
        self.environment, self.sources = sources.environment, sources
        self.arms = self._lisa()
        explored = self._by_part() if self.environment.head else self._at_rest()
        self.by_part = {arm.name: arm for arm in explored}
        self.learners = {arm.name: arm for arm in self._learning()}

    def preferred(self) -> str | None:
        """Return the learner with the lowest mean loss on the tuning split; None as yet."""
        found, kept = {}, self.sources.kept
        for name in self.learners:
            losses = [held_out_loss(kept / self.sources.run(name, seed)) for seed in TUNING]
            finished = [loss for loss in losses if loss is not None]
            if len(finished) < len(losses):
                return None
            found[name] = sum(finished) / len(finished)
        return min(found, key=found.__getitem__)

    def alike(self) -> list[str]:
        """Return the arms whose steps are the same work: draws by a file, and by what is measured.

        A learner that measures with passes of its own makes more, and so does resetting state.
        """
        drawn = [arm.name for arm in self.arms if arm.name != "reset"]
        passes = self.preferred() in (None, "learner-probe")
        return [name for name in drawn if not (passes and name.startswith("online"))]

    def _lisa(self) -> list[Arm]:
        lisa, of = self._drawn, self._by_profile
        placebo = "--lisa.control=permuted"
        static = (  # name, family, what it is read from, strength, primary
            ("default", "mild", "probe", 1.0, True),
            ("strong", "strong", "probe", SHARP, True),
            ("pool", "strong", "probe", self._pool, True),
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

    def _by_part(self) -> list[Arm]:
        rests = "--lisa.always_active=[head,norm,other]"
        apart = functools.partial(Arm, family="parts", head_apart=True)

        def pool(name: str, control: str) -> Arm:
            words = self._by_profile("probe", self._pool, control, rests)
            return apart(name, words=words, sources=("probe",))

        return [
            Arm("uniform-rests", "mild", lambda seed: self._drawn(rests)),
            apart("uniform-head", words=lambda seed: self._drawn()),
            apart("uniform-parts", words=lambda seed: self._drawn(rests)),
            pool("pool-parts", "none"),
            pool("pool-parts-placebo", "permuted"),
        ]

    def _at_rest(self) -> list[Arm]:
        rests = "--lisa.always_active=[norm,other]"  # embedding and head are one tensor

        def strong(name: str, control: str) -> Arm:
            words = self._by_profile("probe", SHARP, control, rests)
            return Arm(name, "strong", words, ("probe",))

        return [
            Arm("uniform-rests", "mild", lambda seed: self._drawn(rests)),
            strong("strong-rests", "none"),
            strong("strong-rests-placebo", "permuted"),
        ]

    @property
    def _pool(self) -> str:
        """Twice the drawn layers, and a fifth at least."""
        environment = self.environment
        return f"pool={max(environment.few * len(environment.stacks), 2 * environment.drawn)}"

    def _by_profile(
        self, kind: str, strength: float | str, control: str = "none", *words: str
    ) -> Callable[[int], list[str]]:
        def given(seed: int) -> list[str]:
            # Of few layers a probe may name none: then the default is uniform, as a user gets
            # it, and the stronger arms take the scores as they are.
            probabilities = la.sampling_probabilities(
                self.sources.profile(kind, seed),
                self.environment.drawn,
                strength=strength,
                use_intervals=strength == 1.0,
            )
            file = self.sources.file(f"{kind}-{strength}", seed)
            probabilities.save(file)
            drawn = (f"--lisa.probabilities={file}", f"--lisa.control={control}")
            return self._drawn(*drawn, *words)

        return given

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

    def _online(self, seed: int) -> list[str]:
        name = self.preferred()
        if name is None:
            raise LisaError(f"{self.environment.name}: the learners are not compared yet.")
        return self.learners[name].words(seed)
