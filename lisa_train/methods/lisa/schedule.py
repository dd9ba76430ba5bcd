"""Which layers and groups train at which step: draws, visits, and their resumable state."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import TOWER, LisaConfig
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.samplers import never_drawn, seed_word
from lisa_train.methods.lisa.stacks import drawn_stacks, sampler_of
from lisa_train.model.layer_map import Unit as Unit

# First word of the key of a group's draws; the layers' stream is another.
_STREAM = 0x115B
# Bound of (k/L)/π and of its inverse.
MOST_CORRECTION = 4.0
_WORDS = {"layer": "layers", "half": "halves of layers", "module": "modules"}


@dataclass(frozen=True)
class Draw:
    """One draw: it rules the optimizer steps `step`+1 … up to the next draw.

    `visits` counts the draws of every layer so far, this one included; `groups` are the groups
    (embed, head) that were drawn beside the layers; `scores` are the learned ones that π is made
    from, None for a layer that is not known, and None altogether while nothing is. The engine adds
    `trainable_share`, the part of the model's parameters that train from now on, and `state_bytes`,
    the optimizer state that is held when the draw has been made: what left is freed or on the host,
    what came has none yet; and with `correct_lr` the factors on the updates of what is drawn.

    With ``lisa.by="half"`` or ``"module"``, `units` are the indices of what was drawn, `layers`
    those of the layers that any of them is in, and π, visits, scores and factors are of units.
    """

    step: int
    index: int
    layers: tuple[int, ...]
    inclusion_probabilities: tuple[float, ...]
    visits: tuple[int, ...]
    groups: tuple[str, ...] = ()
    scores: tuple[float | None, ...] | None = None
    trainable_share: float | None = None
    state_bytes: int | None = None
    update_factors: tuple[float, ...] | None = None
    units: tuple[int, ...] | None = None


class Schedule:
    """Draws at steps 0, K, 2K and so on, and where in that a run stands.

    Parameters
    ----------
    config
        The settings.
    layer_names
        Names of the model's layers, or of the halves or modules that take turns in their place:
        "layers" below are those then.
    probabilities
        Inclusion probabilities of the layers, of a file or of the prior of what is learned; None
        for those of the settings.
    seed
        Seed of the schedule where `config.seed` is None.
    empty_groups
        Groups in which the model has no tensor: whether they are active makes no difference.
    weights
        Sizes of halves or modules over their mean; None where whole layers take turns.
    budget
        With them, the share of the parameters that trains in a period.
    stacks
        Path of the stack that each layer is in; None where all are in one.
    """

    def __init__(
        self,
        config: LisaConfig,
        layer_names: Sequence[str],
        probabilities: Sequence[float] | None,
        seed: int,
        *,
        empty_groups: Collection[str] = (),
        weights: NDArray[np.float64] | None = None,
        budget: float | None = None,
        stacks: Sequence[str] | None = None,
    ) -> None:
        layers = len(layer_names)
        k = config.activated_layers if budget is None else budget * layers
        self.seed = seed if config.seed is None else config.seed
        self.step = 0
        self.index: int | None = None
        self.layers: tuple[int, ...] = ()
        self.groups: tuple[str, ...] = ()
        self.visits: NDArray[np.int64] = np.zeros(len(layer_names), dtype=np.int64)
        self.k = k
        self.weights = weights
        self._budget = budget
        self._config = config
        self._probabilities = probabilities
        self._empty_groups = frozenset(empty_groups)
        self._layer_names = list(layer_names)
        homes = [""] * layers if stacks is None else stacks
        self._homes = homes
        self.stacks = drawn_stacks(config, homes, probabilities, k, weights)
        control_seed = self.seed if config.control_seed is None else config.control_seed
        places = tuple(stack.layers for stack in self.stacks)
        self.control = Control(config.control, control_seed, places if len(places) > 1 else ())
        # Those of the settings, before the control.
        self.given, self._sampler = sampler_of(
            config, self.stacks, probabilities, self.control, self.seed, weights
        )
        self._activated_at: dict[Unit, int] = {}

    @property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        """π of every layer in the present draw, or before it in the first, shape (L,)."""
        return self._sampler.probabilities(self.index or 0)

    @property
    def always_drawn(self) -> tuple[int, ...]:
        """Layers that are certain to be in every draw to come."""
        return self._sampler.always_drawn()

    @property
    def excluded(self) -> tuple[int, ...]:
        """Layers with π = 0, which no draw ever takes."""
        return self._sampler.excluded()

    @property
    def may_draw_nothing(self) -> bool:
        """Whether a draw may take no layer at all."""
        return self._sampler.may_draw_nothing and not self.always_drawn

    def learn(self, step: int, layer_scores: ArrayLike) -> None:
        """Hand the sampler what was measured of every layer, for the draws to come."""
        scores = np.array(layer_scores, dtype=np.float64)
        if scores.shape != self.visits.shape:
            raise ConfigError(
                f"layer_scores have shape {scores.shape}, but the model has {self.visits.size} "
                "layers; give one number per layer, NaN for what was not measured."
            )
        self._sampler.learn(step, scores)

    @property
    def frozen(self) -> str | None:
        """Why a sampler that learns has stopped; None while it goes on."""
        return getattr(self._sampler, "frozen", None)

    def with_config(self, config: LisaConfig) -> "Schedule":
        """Return a schedule of the same layers that has not begun, with other settings."""
        return Schedule(
            config,
            self._layer_names,
            self._probabilities,
            self.seed,
            empty_groups=self._empty_groups,
            weights=self.weights,
            budget=self._budget,
            stacks=self._homes,
        )

    def advance(self, step: int) -> Draw | None:
        """Go to the optimizer step after `step` completed ones; the draw that this makes, if any.

        A schedule that starts in the middle of a period makes the draw of that period.

        Raises
        ------
        ConfigError
            For a step below 0, or below the last one.
        """
        if step < 0:
            raise ConfigError(f"step counts completed optimizer steps from 0, got {step}.")
        if self.index is not None and step < self.step:
            raise ConfigError(
                f"begin_step({step}) after begin_step({self.step}): the step counts the optimizer "
                "steps of the whole training; were it to begin anew with an epoch, so would the "
                "draws. To go on from an earlier state, load it first (load_state_dict)."
            )
        self.step = step
        index = self.draw_of(step)
        if index == self.index:
            return None
        self.index = index
        pi = tuple(self._sampler.probabilities(index).tolist())
        scores = self._sampler.scores(index)
        self.layers = self._sampler.draw(index)
        self.groups = self._draw_groups(index)
        drawn: tuple[Unit, ...] = (*self.layers, *self.groups)
        self._activated_at = {unit: self._activated_at.get(unit, step) for unit in drawn}
        self.visits[list(self.layers)] += 1
        return Draw(
            step,
            index,
            self.layers,
            pi,
            tuple(self.visits.tolist()),
            self.groups,
            scores=None if scores is None else _with_gaps(scores),
        )

    def draw_of(self, step: int) -> int:
        """Number of the draw that rules the step after `step` completed ones."""
        return step // self._config.interval_steps

    def draws_at(self, step: int) -> bool:
        """Whether a draw is due after `step` completed steps, which follows another one."""
        return self.index is not None and self.draw_of(step) != self.index

    def update_factor(self, unit: Unit) -> float:
        """Factor on the updates of a drawn unit, ((k/L)/π)^ρ; 1 for groups."""
        power = self._config.correct_lr
        if not power or not isinstance(unit, int):
            return 1.0
        pi = self.inclusion_probabilities
        ratio = self.k / pi.size / float(pi[unit])
        return float(min(MOST_CORRECTION, max(1 / MOST_CORRECTION, ratio)) ** power)

    def update_factors(self) -> tuple[float, ...] | None:
        """Return the factors of the layers drawn now; None without a correction."""
        if not self._config.correct_lr:
            return None
        return tuple(self.update_factor(layer) for layer in self.layers)

    def ages(self) -> dict[Unit, int]:
        """Steps since the activation of every drawn unit."""
        return {unit: self.step - at for unit, at in self._activated_at.items()}

    def never_drawn(self, total_steps: int) -> tuple[int, ...]:
        """Layers that no draw of the first `total_steps` steps takes although it could.

        As far as that is settled, and besides those that are `excluded`.
        """
        return never_drawn(self._sampler, -(-total_steps // self._config.interval_steps))

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands, as JSON values."""
        return {
            "version": 1,
            "index": self.index,
            "step": self.step,
            "layers": list(self.layers),
            "groups": list(self.groups),
            "visits": self.visits.tolist(),
            "activated_at": {str(unit): step for unit, step in self._activated_at.items()},
            "interval_steps": self._config.interval_steps,
            "layer_names": self._layer_names,
            "sampler": self._sampler.state_dict(),
            "settings": _settings(self._config),
            "towers": TOWER in self._config.always_active,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; another model or other settings are a `ConfigError`."""
        saved_by = state.get("settings", {}).get("by", "layer")
        if saved_by != self._config.by:
            raise ConfigError(
                f"the saved LISA state has by = {saved_by!r}, this run {self._config.by!r}; resume "
                "with the setting that it was saved with."
            )
        names = list(state["layer_names"])
        if names != self._layer_names:
            raise ConfigError(
                f"the saved LISA state is of {len(names)} {_WORDS[self._config.by]} ({names[0]} "
                f"…), this model has {len(self._layer_names)} ({self._layer_names[0]} …); resume "
                "with the model that it was saved with."
            )
        period = self._config.interval_steps
        if state["interval_steps"] != period:
            raise ConfigError(
                f"the saved LISA state has interval_steps = {state['interval_steps']}, this run "
                f"{period}; resume with the setting that it was saved with."
            )
        saved_stacks = "apart" if state["sampler"].get("scheme") == "stacks" else "together"
        stacks = "apart" if len(self.stacks) > 1 else "together"
        if saved_stacks != stacks:
            raise ConfigError(
                f"the saved LISA state draws its stacks of layers {saved_stacks}, this run "
                f"{stacks}; resume with lisa.stacks set to {saved_stacks!r}."
            )
        settings = _settings(self._config)
        for name, saved in state.get("settings", {}).items():  # states of older versions lack it
            different = name in settings and saved != settings[name]
            if name == "always_active":
                if "towers" not in state and "other" in saved:  # they trained with it until then
                    saved = [*saved, TOWER]
                different = bool((set(saved) ^ set(settings[name])) - self._empty_groups)
            if different:
                raise ConfigError(
                    f"the saved LISA state has {name} = {saved!r}, this run {settings[name]!r}; "
                    "resume with the setting that it was saved with."
                )
        self._sampler.load_state_dict(state["sampler"])
        self.index = state["index"]
        self.step = int(state["step"])
        self.layers = tuple(int(i) for i in state["layers"])
        self.groups = tuple(state["groups"])
        self.visits = np.array(state["visits"], dtype=np.int64)
        self._activated_at = {
            int(unit) if unit.isdigit() else unit: int(step)
            for unit, step in state["activated_at"].items()
        }

    def _draw_groups(self, index: int) -> tuple[str, ...]:
        """Groups with a probability of their own that draw `index` takes."""
        drawn = []
        for group, probability in self._config.group_probabilities.items():
            key = [_STREAM, ("embed", "head").index(group), seed_word(self.seed), index]
            if np.random.default_rng(key).random() < probability:
                drawn.append(group)
        return tuple(drawn)


def _settings(config: LisaConfig) -> dict[str, Any]:
    """Settings beside the sampler's without which a resumed run would not be the same."""
    return {
        "always_active": sorted(set(config.always_active)),
        "embed_probability": config.embed_probability,
        "head_probability": config.head_probability,
        "optimizer_state": config.optimizer_state,
        "warmup_steps": config.warmup_steps,
        "precision": config.precision,
        "control": config.control,
        "correct_lr": config.correct_lr,
        "learn": None if config.learn is None else config.learn.metric,
        "by": config.by,
    }


def _with_gaps(scores: NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(float(x) if np.isfinite(x) else None for x in scores)
