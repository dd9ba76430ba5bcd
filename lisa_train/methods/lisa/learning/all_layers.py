"""Measuring passes: of all layers, at the memory of one tensor's gradient; of a batch's halves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lisa_train.methods.lisa.learning.evidence import Array
from lisa_train.model.norms import inner_products, squares, stacked
from lisa_train.model.parallel import processes
from lisa_train.model.sharding import requiring_gradients, reshard, unsynchronised
from lisa_train.model.side_pass import fresh_leaves, random_state_kept


def gradients_of_all(
    model: nn.Module,
    units: Mapping[Any, Sequence[nn.Parameter]],
    layers: int,
    backward: Callable[[], object],
) -> Array:
    """Return ‖g‖/√N of every layer in one pass, shape (L,).

    NaN where it reached none, infinite where the gradient is not finite.

    Others stand in for the model's tensors, so that nothing that hangs on them notices, and every
    gradient is dropped when its square is taken. Random streams are put back. With
    several processes, each makes a pass of its own and the mean of the squares counts; where FSDP2
    splits the tensors it averages the gradients themselves, and the square of that mean counts.

    Parameters
    ----------
    model
        The model.
    units
        Tensors of every layer.
    layers
        Number of layers.
    backward
        Makes a forward and a backward pass of the model.
    """
    owner = {id(p): i for i in range(layers) for p in units[i]}
    found: dict[int, list[torch.Tensor]] = {}

    def take(tensor: torch.Tensor, key: int) -> None:
        if key in owner and tensor.grad is not None:
            found.setdefault(owner[key], []).append(squares([tensor.grad])[0])
        tensor.grad = None

    with _taking_gradients(model, set(owner), take) as split:
        backward()
    sizes = np.array([sum(p.numel() for p in units[i]) for i in range(layers)])
    return np.asarray(np.sqrt(_together(found, layers, split=split) / sizes))


def signal_of_halves(
    model: nn.Module,
    units: Mapping[Any, Sequence[nn.Parameter]],
    layers: int,
    drawn: Sequence[int],
    halves: Sequence[Callable[[], object]],
) -> Array:
    """Return ⟨G₁, G₂⟩ of every drawn layer, shape (L,): ‖E g‖² on average, however noisy.

    NaN for the others, and where a half reached nothing; infinite where it is not finite. Stand-ins
    and random streams as in `gradients_of_all`; the first half's gradients of the drawn layers are
    held until those of the second arrive. With several processes the mean over them counts; where
    FSDP2 splits the tensors, the product of the halves' gradients averaged over the processes.

    Parameters
    ----------
    model
        The model.
    units
        Tensors of every layer.
    layers
        Number of layers.
    drawn
        Those that train.
    halves
        Two functions, each a forward and backward pass of one half; one that makes none leaves
        nothing measured.
    """
    owner = {id(p): i for i in drawn for p in units[i]}
    first: dict[int, torch.Tensor] = {}
    found: dict[int, list[torch.Tensor]] = {}

    def take(tensor: torch.Tensor, key: int) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is None or key not in owner:
            return
        if key in first:
            product = inner_products([first.pop(key)], [gradient])[0]
            found.setdefault(owner[key], []).append(product)
        elif not second:
            first[key] = gradient

    second = False
    with _taking_gradients(model, set(owner), take) as split:
        halves[0]()
        second = True
        halves[1]()
    return _together(found, layers, split=split)


@contextmanager
def _taking_gradients(
    model: nn.Module, wanted: set[int], take: Callable[..., None]
) -> Iterator[bool]:
    """Give every gradient of the passes inside to `take`, which drops it.

    Parameters
    ----------
    model
        The model; nothing of it changes, random streams are put back.
    wanted
        Ids of the tensors that have gradients though they may rest.
    take
        Takes a tensor whose gradient is complete, and as `key` the id of the model's own.

    Yields
    ------
    bool
        Whether FSDP2 splits the tensors: gradients are pieces then, averaged over the processes.
    """
    # What is still gathered would be taken for a plain tensor, and keep the flags that it has.
    reshard(model)
    with ExitStack() as stack:
        plain = stack.enter_context(fresh_leaves(model, wanted))
        split = stack.enter_context(requiring_gradients(model, wanted))
        stack.enter_context(unsynchronised(model))
        for key, tensor in {**plain, **split}.items():
            if tensor.requires_grad:
                hook = partial(take, key=key)
                stack.callback(tensor.register_post_accumulate_grad_hook(hook).remove)
        stack.enter_context(random_state_kept(model))
        stack.enter_context(torch.enable_grad())
        yield bool(split)


def _together(found: dict[int, list[torch.Tensor]], layers: int, *, split: bool) -> Array:
    """Numbers of the layers in all processes: sums over pieces, else the mean of those that know.

    NaN for a layer that no process knows, infinite where a number is not finite.
    """
    total = np.full(layers, np.nan)
    if found:
        reached = sorted(found)
        sums = stacked([stacked(found[i]).sum() for i in reached]).cpu().double().numpy()
        total[reached] = np.where(np.isfinite(sums), sums, np.inf)
    if processes() == 1:
        return total
    every: list[Any] = [None] * processes()
    dist.all_gather_object(every, total)
    stack = np.stack(every)
    count = (~np.isnan(stack)).sum(axis=0)
    sums = np.nansum(stack, axis=0)
    return np.where(count > 0, sums if split else sums / np.maximum(count, 1), np.nan)
