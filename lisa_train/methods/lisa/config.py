"""`LisaConfig`: which layers train, and for how long."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Literal, get_args

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of, real, whole
from lisa_train.methods.lisa.learning.config import LearnConfig

ALWAYS_ACTIVE_GROUPS = ("embed", "head", "norm", "other")
# What trains only where it is named: towers of images and sounds.
TOWER = "tower"
_GROUPS = (*ALWAYS_ACTIVE_GROUPS, TOWER)
Sampling = Literal[
    "uniform", "bernoulli", "cyclic", "systematic", "conditional_poisson", "balanced"
]
OptimizerState = Literal["reset", "keep", "offload"]
ActivePrecision = Literal["model", "fp32_active"]
Recompute = Literal["all", "frozen"]
By = Literal["layer", "half", "module"]
Stacks = Literal["apart", "together"]
# Those of them that keep a budget of parameters (`Sampler.keeps_budget`).
BUDGETED = ("uniform", "bernoulli", "balanced")
ControlKind = Literal["none", "permuted", "reversed", "uniform"]
# Σπ may miss k by the rounding of a file that keeps six decimals.
SUM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LisaConfig:
    """Which layers train, and for how long (LISA, arXiv 2403.17919, Algorithm 1).

    Parameters
    ----------
    activated_layers
        Number of layers k that train in each period (γ in the paper); with
        `sampling="bernoulli"` the expected number.
    interval_steps
        Optimizer steps K of a period, from one draw to the next.
    sampling
        How the layers of a period are drawn: ``uniform`` (all sets of k layers equally
        likely), ``bernoulli`` (every layer on its own, the paper's first version), ``cyclic``
        (shuffled sweeps), and three exact schemes for unequal probabilities: ``systematic``,
        ``conditional_poisson`` and ``balanced`` (no layer waits long). ``uniform`` with unequal
        `probabilities` draws by the systematic scheme, of which it is the equal-weight case. In
        Python, also the name of a sampler of your own, see `lisa_train.methods.lisa.samplers`.
    probabilities
        Path of a `probabilities.json` file, or a sequence of inclusion probabilities π, one per
        layer, Σπ = k. None means equal probabilities k/L. A layer with π = 0 is never drawn: it
        has no gradient and no optimizer state.
    always_active
        Groups that train in every period: any of ``embed``, ``head``, ``norm``, and ``other``,
        which is all else outside the layers (a head of an unknown name, a projection). A tower of
        images or sounds beside the language model rests unless ``tower`` is named too; to rotate
        its layers, name them in `layers`. What is frozen before LISA starts stays frozen.
    optimizer_state
        What happens to the optimizer state of a layer that is frozen again: ``reset`` frees it,
        ``keep`` leaves it, ``offload`` moves it to host memory until the layer returns. In Python,
        also the name of a policy of your own, see `lisa_train.optim.policies`.
    seed
        Seed of the layer schedule; None takes the training seed.
    warmup_steps
        Scale the first updates of a layer after its activation by 1/(n+1), 2/(n+1), … over n
        steps; after a state reset, Adam's first step moves every weight by the full learning rate.
    embed_probability
        Draw the embeddings in each period with this probability, like a layer, instead of
        naming them in `always_active`.
    head_probability
        The same for the head; a head tied to the embeddings goes with them.
    layers
        Path of the list (or ModuleDict) of layers to rotate, as
        ``model.vision_tower.encoder.layers``; several separated by commas. Needed only where the
        structure of a model leaves a choice.
    precision
        ``model`` trains in the precision of the weights. ``fp32_active`` keeps an fp32 copy of
        every active tensor of a bf16 model, which the optimizer steps, and of which the model
        holds a stochastic rounding, new after every step: pure bf16 rounds most of a small update
        away. Model and gradients stay bf16; micro-batches are added up in fp32, but under FSDP2.
    recompute
        With gradient checkpointing, the layers that run again in the backward pass: ``all``, or
        the ``frozen`` ones alone: those that train keep their activations, which saves their
        second forward pass and costs their memory.
    learn
        Learn the probabilities while the layers train, see `LearnConfig`; with
        ``sampling="balanced"``. None leaves them as they are.
    control
        The placebo: the same probabilities, of the file or as they are learned, given to other
        layers. ``permuted`` at random, once for the whole run; ``reversed`` in rank; ``uniform``.
    control_seed
        Seed of the permutation; None takes that of the schedule. Refused without a `control`.
    by
        What takes turns: whole layers; their attention and MLP ``half``; or every ``module``, a
        single matrix with its bias (after MISA, arXiv 2511.00056). Norms go with what is nearest to
        them. Halves and modules differ in size, so that a draw has a budget of parameters instead
        of a number k: Σ π·size is the `budget` exactly, and a draw misses it by less than one unit.
        With ``uniform``, ``balanced`` or ``bernoulli`` sampling.
    budget
        With ``by="half"`` or ``"module"``: share of the layers' parameters that trains in a
        period, between 0 and 1, in the place of `activated_layers`; None takes k/L, what so many
        layers would have.
    stacks
        Where there are several stacks of layers (encoder and decoder): ``apart`` draws from each
        by itself, in every draw so many of its layers; `activated_layers` is the number of all of
        them, shared in proportion to the depths, at least one of each, or as the `probabilities`
        sum up in each stack, to whole numbers; a `budget` holds in each. Controls, learning, and a
        pool work within a stack. ``together`` draws from all layers as if they were one stack.
    correct_lr
        Power ρ, from 0 to 1: the update of a drawn layer is multiplied by ((k/L)/π)^ρ, the ratio
        between 1/4 and 4. At 0, layers drawn more often move more; at 1 they move alike on
        average, and only how evenly changes. On the update, because Adam divides a factor on the
        gradient out; it takes a copy of the layers that train.
    """

    activated_layers: int = 2
    interval_steps: int = 20
    sampling: Sampling = "uniform"
    probabilities: str | tuple[float, ...] | None = None
    always_active: tuple[str, ...] = ALWAYS_ACTIVE_GROUPS
    optimizer_state: OptimizerState = "reset"
    seed: int | None = None
    warmup_steps: int = 0
    embed_probability: float | None = None
    head_probability: float | None = None
    layers: str | None = None
    precision: ActivePrecision = "model"
    recompute: Recompute = "all"
    learn: LearnConfig | None = None
    control: ControlKind = "none"
    control_seed: int | None = None
    correct_lr: float = 0.0
    by: By = "layer"
    budget: float | None = None
    stacks: Stacks = "apart"

    def __post_init__(self) -> None:
        for name, least in (("activated_layers", 1), ("interval_steps", 1), ("warmup_steps", 0)):
            value = whole(f"lisa.{name}", getattr(self, name), f" of at least {least}", least)
            object.__setattr__(self, name, value)
        if self.seed is not None:
            words = ", or None for the training seed"
            object.__setattr__(self, "seed", whole("lisa.seed", self.seed, words))
        if self.control_seed is not None:
            words = " of at least 0, or None for the seed of the schedule"
            value = whole("lisa.control_seed", self.control_seed, words, 0)
            object.__setattr__(self, "control_seed", value)
            if self.control == "none":
                raise ConfigError(
                    f"lisa.control_seed is {value}, but there is no control whose seed it could "
                    "be: set lisa.control to permuted, or leave lisa.control_seed out."
                )
        if not isinstance(self.layers, str | None):
            raise ConfigError(
                f"lisa.layers is {self.layers!r}, but must be the path of the list of layers, as "
                "'model.layers', or None to find it."
            )
        self._check_registered_names()
        self._check_units()
        one_of("lisa.stacks", self.stacks, get_args(Stacks))
        one_of("lisa.precision", self.precision, get_args(ActivePrecision))
        one_of("lisa.recompute", self.recompute, get_args(Recompute))
        if isinstance(self.always_active, str):
            raise ConfigError(
                f"lisa.always_active is the text {self.always_active!r}, but must be a list of "
                f"groups, as [{self.always_active}]."
            )
        if not isinstance(self.always_active, Iterable):
            raise ConfigError(
                f"lisa.always_active is {self.always_active!r}, but must be a list of groups (of "
                f"{', '.join(_GROUPS)}); give [] for none."
            )
        object.__setattr__(self, "always_active", tuple(self.always_active))
        for group in self.always_active:
            one_of("lisa.always_active", group, _GROUPS)
        for group, given in self.group_probabilities.items():
            option = f"{group}_probability"
            probability = real(f"lisa.{option}", given, "a number in (0, 1], or None")
            object.__setattr__(self, option, probability)
            if not 0.0 < probability <= 1.0:
                raise ConfigError(
                    f"lisa.{group}_probability is {probability:g}, but must lie in (0, 1]; leave "
                    f"{group!r} out of always_active to freeze it."
                )
            if group in self.always_active:
                raise ConfigError(
                    f"lisa.{group}_probability is {probability:g}, but {group!r} is also in "
                    f"always_active = {list(self.always_active)}; take it out of one of them."
                )
        self._check_probabilities()
        self._check_learning()

    @property
    def group_probabilities(self) -> dict[str, float]:
        """Groups that are drawn like layers, with their probability."""
        given = {"embed": self.embed_probability, "head": self.head_probability}
        return {group: p for group, p in given.items() if p is not None}

    def _check_registered_names(self) -> None:
        """`ConfigError` unless sampler and policy are built in or registered.

        The registries load numpy and torch, and are asked only for other names than the built-in.
        """
        built_in = get_args(Sampling)
        if self.sampling not in built_in:
            from lisa_train.methods.lisa.samplers import SAMPLERS

            added = (name for name in SAMPLERS if name not in built_in)
            one_of("lisa.sampling", self.sampling, (*built_in, *added))
        built_in = get_args(OptimizerState)
        if self.optimizer_state not in built_in:
            from lisa_train.optim.policies import POLICIES

            added = (name for name in POLICIES if name not in built_in)
            one_of("lisa.optimizer_state", self.optimizer_state, (*built_in, *added))

    def _check_units(self) -> None:
        """`ConfigError` unless budget and sampling fit what takes turns."""
        one_of("lisa.by", self.by, get_args(By))
        if self.budget is not None:
            words = "a number between 0 and 1, or None"
            object.__setattr__(self, "budget", real("lisa.budget", self.budget, words))
            if not 0.0 < self.budget < 1.0:
                raise ConfigError(f"lisa.budget is {self.budget:g}, but must be {words}.")
        if self.by == "layer":
            if self.budget is not None:
                raise ConfigError(
                    f"lisa.budget is {self.budget:g}, but whole layers are drawn, of which "
                    "activated_layers says how many; set lisa.by to 'module' or 'half', or leave "
                    "lisa.budget out."
                )
        elif self.budget is not None and self.activated_layers != LisaConfig.activated_layers:
            raise ConfigError(
                f"lisa.activated_layers is {self.activated_layers}, but lisa.budget is "
                f"{self.budget:g} and alone says how much trains; set lisa.budget to null to go by "
                "the number of layers, or leave lisa.activated_layers out."
            )
        elif not self._keeps_budget():
            raise ConfigError(
                f"lisa.sampling is {self.sampling!r} with lisa.by={self.by!r}: it draws a fixed "
                "number, and what differs in size needs a budget of parameters; choose one of "
                f"{', '.join(BUDGETED)}."
            )

    def _keeps_budget(self) -> bool:
        if self.sampling in get_args(Sampling):
            return self.sampling in BUDGETED
        from lisa_train.methods.lisa.samplers import SAMPLERS

        return SAMPLERS[self.sampling].keeps_budget

    def _check_learning(self) -> None:
        one_of("lisa.control", self.control, get_args(ControlKind))
        power = real("lisa.correct_lr", self.correct_lr, "a number from 0 to 1")
        object.__setattr__(self, "correct_lr", power)
        if not 0.0 <= power <= 1.0:
            raise ConfigError(f"lisa.correct_lr is {power:g}, but must be a number from 0 to 1.")
        if power and self.learn is None and self.probabilities is None:
            raise ConfigError(
                f"lisa.correct_lr is {power:g}, but without lisa.probabilities or lisa.learn every "
                "layer is drawn alike and there is nothing to correct; leave it out."
            )
        if self.learn is None:
            if self.control != "none" and self.probabilities is None:
                raise ConfigError(
                    f"lisa.control is {self.control!r}, but there are no probabilities to give to "
                    "other layers: set lisa.probabilities or lisa.learn."
                )
            return
        if not isinstance(self.learn, LearnConfig):
            raise ConfigError(
                f"lisa.learn is {self.learn!r}, but must be a LearnConfig, or None to learn "
                "nothing."
            )
        if self.sampling != "balanced":
            raise ConfigError(
                f"lisa.learn is set with sampling={self.sampling!r}, which does not follow "
                "probabilities that move; set lisa.sampling to 'balanced'."
            )
        if self.probabilities is not None:
            raise ConfigError(
                "lisa.learn and lisa.probabilities are both set; give the file as "
                "lisa.learn.prior, from which the learning starts, or leave one of them out."
            )

    def _check_probabilities(self) -> None:
        if self.probabilities is None or isinstance(self.probabilities, str | PathLike):
            if isinstance(self.probabilities, PathLike):
                object.__setattr__(self, "probabilities", fspath(self.probabilities))
            return
        try:
            given = tuple(self.probabilities)
        except TypeError:  # a number, or an array without dimensions
            raise ConfigError(
                f"lisa.probabilities is {self.probabilities!r}, but must be the path of a "
                "probabilities.json file or a list of one number per layer."
            ) from None
        values = tuple(
            real(f"lisa.probabilities[{i}]", p, "a number from 0 to 1") for i, p in enumerate(given)
        )
        object.__setattr__(self, "probabilities", values)
        for i, value in enumerate(values):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(
                    f"lisa.probabilities[{i}] is {value:g}, but every inclusion probability must "
                    "lie between 0 (never drawn) and 1."
                )
        # Of halves and modules the sizes count, which the model knows.
        if self.by == "layer" and abs(sum(values) - self.activated_layers) > SUM_TOLERANCE:
            raise ConfigError(
                f"lisa.probabilities sum to {sum(values):.6g}, but activated_layers is "
                f"{self.activated_layers}: they must be equal; scale the probabilities or set "
                "activated_layers to their sum."
            )
