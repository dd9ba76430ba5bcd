"""What LISA says: what trains beside the layers, what is not as it seems, what was not reached."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.layers import canonical_name
from lisa_train.methods.lisa.config import TOWER, LisaConfig
from lisa_train.methods.lisa.gradient_reach import Unreached
from lisa_train.methods.lisa.schedule import Draw
from lisa_train.methods.lisa.stacks import DrawnStack
from lisa_train.methods.lisa.units import Units
from lisa_train.methods.measured_on import of_another_model
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.module_tree import unwrap
from lisa_train.model.parallel import is_first
from lisa_train.model.towers import sense_towers

# Lines of names in one announcement; what has more is put together by module.
_MOST = 8


logger = logging.getLogger(__name__)


class Notices:
    """Says sentences in the log of the first process, and to a listener in every one.

    Parameters
    ----------
    listener
        Called with every sentence.
    """

    def __init__(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener
        self._unreached_said = self._frozen_said = False
        self._out: list[int] | None = None

    def at_start(
        self,
        model: nn.Module,
        layer_map: LayerMap,
        config: LisaConfig,
        units: Mapping[int | str, Sequence[torch.Tensor]],
        turns: Units,
        stacks: Sequence[DrawnStack],
        excluded: Sequence[int],
        missing: Sequence[int],
        total_steps: int | None,
        seeds: Sequence[int],
    ) -> None:
        """Say what `at_start` finds, and that `seeds` of the processes differ."""
        for text in at_start(
            model, layer_map, config, units, turns, stacks, excluded, missing, total_steps
        ):
            self._say(text)
        if len(set(seeds)) > 1:
            self._say(
                f"the processes start with different seeds ({', '.join(map(str, seeds))}): all "
                f"draw their layers by that of process 0 ({seeds[0]})"
            )

    def unreached(self, found: Unreached | None) -> None:
        """Name the drawn layers that steps of the period did not reach; on the screen once."""
        if found is not None:
            self._say(str(found), logging.INFO if self._unreached_said else logging.WARNING)
            self._unreached_said = True

    def frozen(self, reason: str | None) -> None:
        """Say once why nothing is learned any more."""
        if reason is not None and not self._frozen_said:
            self._say(reason)
            self._frozen_said = True

    def drawn(self, draw: Draw, turns: Units) -> None:
        """Log a draw; name what a learner's pool leaves out whenever that changes."""
        log_draw(draw)
        out = [i for i, pi in enumerate(draw.inclusion_probabilities) if pi == 0.0]
        if draw.scores is None or out == (self._out or []):
            return
        said = never(turns, out) or "the pool leaves nothing out any more"
        self._say(
            f"before step {draw.step + 1}: {said.replace('are never drawn', 'are not drawn now')}",
            logging.WARNING if self._out is None else logging.INFO,
        )
        self._out = out

    def _say(self, text: str, level: int = logging.WARNING) -> None:
        if is_first():
            logger.log(level, text)
        if self._listener is not None:
            self._listener(text)


def log_draw(draw: Draw) -> None:
    """Log what trains from now on."""
    parts = "" if draw.units is None else f"{len(draw.units)} parts of "
    logger.info(
        "step %d: training %slayers %s: %.1f %% of the parameters, %.1f MB of optimizer state "
        "held; %d of %d %s visited so far",
        draw.step, parts, ", ".join(map(str, draw.layers)) or "none",
        100 * (draw.trainable_share or 0), (draw.state_bytes or 0) / 1e6,
        sum(n > 0 for n in draw.visits), len(draw.visits), "parts" if parts else "layers",
    )  # fmt: skip


def at_start(
    model: nn.Module,
    layer_map: LayerMap,
    config: LisaConfig,
    units: Mapping[int | str, Sequence[torch.Tensor]],
    turns: Units,
    stacks: Sequence[DrawnStack],
    excluded: Sequence[int],
    missing: Sequence[int],
    total_steps: int | None,
) -> list[str]:
    """Everything that the user should know before the first step, a sentence each.

    Parameters
    ----------
    model, layer_map, config
        The model, its layers, the settings.
    units
        Tensors with gradients of every layer and group.
    turns
        What takes turns: layers, or parts of them.
    stacks
        Those that are drawn apart.
    excluded
        Those of them with a probability of 0.
    missing
        Others that the schedule of `total_steps` never reaches.
    total_steps
        Optimizer steps to come, if known.
    """
    found = [
        towers(model, layer_map, units[TOWER], active=TOWER in config.always_active),
        unclassified(model, units["other"], active="other" in config.always_active),
        every_layer(model, layer_map, config),
        layer_drop(model),
        nothing_to_copy(config, units),
        drawn_apart(stacks, config),
        never(turns, excluded),
        of_another_model(config.probabilities, model),
    ]
    if missing:
        found.append(
            f"{len(missing)} of {len(turns)} {_called(turns, missing)} will "
            f"never train: {total_steps} steps with interval_steps = {config.interval_steps} and "
            f"{_amount(config)} do not reach them; use a shorter "
            f"period, more {'layers' if turns.by == 'layer' else 'parameters'}, or "
            f"sampling='balanced'{' or ' + repr('cyclic') if turns.by == 'layer' else ''}"
        )
    return [text for text in found if text]


def towers(
    model: nn.Module, layer_map: LayerMap, tensors: Sequence[torch.Tensor], *, active: bool
) -> str | None:
    """Name the towers of images and sounds, their size, and what becomes of them."""
    if not tensors:
        return None
    size = sum(p.numel() for p in tensors)
    paths = sense_towers(model, layer_map)
    share = size / sum(p.numel() for p in model.parameters())
    what = f"{' and '.join(paths)}: {size:,} parameters, {share:.1%} of the model"
    whose = "tower" if len(paths) == 1 else "towers"
    if active:
        return f"LISA trains in every period the {whose} of images or sounds, {what}"
    return (
        f"the {whose} of images or sounds rest{'s' if len(paths) == 1 else ''} under LISA, {what}; "
        "put 'tower' into lisa.always_active to train in every period, or name the path of its "
        "layers in lisa.layers to have them take turns"
    )


def unclassified(model: nn.Module, tensors: Sequence[torch.Tensor], *, active: bool) -> str | None:
    """Name what is neither layer, embedding, head nor norm, its size, and what becomes of it."""
    if not tensors:
        return None
    members = set(tensors)
    named = [(canonical_name(n), p) for n, p in model.named_parameters() if p in members]
    size = sum(p.numel() for p in members)
    share = size / sum(p.numel() for p in model.parameters())
    count = "1 tensor" if len(named) == 1 else f"{len(named)} tensors"
    what = (
        f"what is neither layer, embedding, head nor norm: {count}, {size:,} parameters, "
        f"{share:.1%} of the model ({_listing(named)})"
    )
    if active:
        return f"LISA trains in every period {what}; freeze them first to let them rest"
    return f"LISA never trains {what}; put 'other' into lisa.always_active to train them"


def drawn_apart(stacks: Sequence[DrawnStack], config: LisaConfig) -> str | None:
    """Say how many layers of each stack a draw takes."""
    if len(stacks) < 2:
        return None
    if config.by != "layer":
        said = "their share of the budget: " + ", ".join(stack.path for stack in stacks)
    else:
        about = "about " if config.sampling == "bernoulli" else ""
        said = about + ", ".join(f"{s.k:.4g} of {len(s.layers)} in {s.path}" for s in stacks)
    return (
        f"the {len(stacks)} stacks of layers are drawn apart, {said}; lisa.stacks='together' draws "
        "from all as from one"
    )


def _listing(named: Sequence[tuple[str, torch.Tensor]]) -> str:
    if len(named) <= _MOST:
        return ", ".join(f"{name} {'x'.join(map(str, p.shape)) or 1}" for name, p in named)
    deepest = max(name.count(".") for name, _ in named)
    groups: dict[str, list[torch.Tensor]] = {}
    for depth in range(deepest, 0, -1):
        groups = {}
        for name, parameter in named:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
        if len(groups) <= _MOST:
            break
    parts = [f"{path} {sum(p.numel() for p in some):,}" for path, some in groups.items()]
    more = len(parts) - _MOST
    return ", ".join(parts[:_MOST]) + (f" and {more} more" if more > 0 else "")


def every_layer(model: nn.Module, layer_map: LayerMap, config: LisaConfig) -> str | None:
    """Say that nothing rotates, or that layers share their weights."""
    count = len(layer_map)
    layers = "1 layer" if count == 1 else f"{count} layers"
    settings = getattr(unwrap(model), "config", None)
    counted = getattr(settings, "num_hidden_layers", 0)
    # ALBERT's word for it; a model that was cut short has fewer layers than it says, too.
    groups = getattr(settings, "num_hidden_groups", None)
    shared = ""
    if layer_map.repeats:
        shared = f" that {count + len(layer_map.repeats)} places of its stack share"
    elif config.layers is None and groups == count and counted > count:
        shared = f" that the {counted} hidden layers of its configuration share"
    if config.by == "layer" and config.activated_layers >= count:
        return (
            f"activated_layers is {config.activated_layers} and the model has {layers}{shared}: "
            "every layer trains in every period, as in full fine-tuning"
        )
    return f"the model has {layers}{shared}" if shared else None


def nothing_to_copy(
    config: LisaConfig, units: Mapping[int | str, Sequence[torch.Tensor]]
) -> str | None:
    """Say that fp32 copies were asked for, and that no tensor that trains has need of one."""
    held = {p.dtype for tensors in units.values() for p in tensors}
    if config.precision != "fp32_active" or torch.bfloat16 in held:
        return None
    return (
        "lisa.precision is 'fp32_active' and has no effect: no tensor that trains is held in bf16; "
        "load the model in bfloat16, or set lisa.precision to 'model'"
    )


def _called(turns: Units, which: Sequence[int]) -> str:
    """Layers by their numbers, parts of layers by their names."""
    if turns.by == "layer":
        return f"layers ({', '.join(map(str, which))})"
    names = [turns.names[i] for i in which[:_MOST]]
    more = f" and {len(which) - _MOST} more" if len(which) > _MOST else ""
    return f"{'halves' if turns.by == 'half' else 'modules'} ({', '.join(names)}{more})"


def _amount(config: LisaConfig) -> str:
    if config.budget is not None:
        return f"a budget of {config.budget:g}"
    return f"activated_layers = {config.activated_layers}"


def never(turns: Units, excluded: Sequence[int]) -> str | None:
    """Name what the probabilities leave out."""
    if not excluded:
        return None
    return (
        f"{len(excluded)} of {len(turns)} {_called(turns, excluded)} have "
        "probability 0 and are never drawn: they keep their weights, and have neither gradients "
        "nor optimizer state"
    )


def layer_drop(model: nn.Module) -> str | None:
    """Say that the model skips layers at random while it trains (LayerDrop)."""
    found = next(iter(_layer_drops(model)), None)
    if found is None:
        return None
    name, value = found
    return (
        f"{name} is {value:g}: the model skips that share of its layers at random in every forward "
        f"pass, and a layer that is skipped while it is drawn gets no gradient; set {name} to 0 to "
        "train what is drawn"
    )


def _layer_drops(model: nn.Module) -> Iterator[tuple[str, float]]:
    owners: list[tuple[str, Any]] = [("config", getattr(unwrap(model), "config", None))]
    owners += [(canonical_name(name) or "model", module) for name, module in model.named_modules()]
    for where, owner in owners:
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop"):
            value = getattr(owner, name, None)
            if isinstance(value, float) and value > 0:
                yield f"{where}.{name}", value
