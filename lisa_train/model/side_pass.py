"""What lets a pass leave no trace: other leaves for a model's tensors, random states put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lisa_train.model.sharding import is_sharded


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Put back the random states of torch (also on the model's devices), NumPy and Python."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002  # what others draw from
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_streams(model: nn.Module, seed: int) -> None:
    """Begin the random streams of torch (also on the model's devices), NumPy and Python anew.

    Those that `random_state_kept` puts back, and no other.
    """
    torch.default_generator.manual_seed(seed)
    for device in {p.device.index for p in model.parameters() if p.is_cuda}:
        torch.cuda.default_generators[device].manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # what others draw from
    random.seed(seed)


@contextmanager
def fresh_leaves(model: nn.Module, wanted: set[int]) -> Iterator[dict[int, nn.Parameter]]:
    """Put tensors of the same memory into the modules; yield them by the id of the real ones.

    Parameters
    ----------
    model
        The model. Sharded tensors and packed integers stay.
    wanted
        Ids of the tensors whose stand-ins require gradients; the others' do if they do.

    Notes
    -----
    Hooks, flags and gradients of the real tensors do not take part in a pass, so that there is
    nothing to put back: DDP counts which tensors a pass reached even outside its own forward.
    """
    found = {
        id(p): _stand_in(p, p.requires_grad or id(p) in wanted)
        for p in model.parameters()
        if p.is_floating_point() and not is_sharded(p)
    }
    places = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in found
    ]
    try:
        for module, name, p in places:
            setattr(module, name, found[id(p)])
        yield found
    finally:
        for module, name, p in places:
            setattr(module, name, p)


def _stand_in(parameter: nn.Parameter, requires_grad: bool) -> nn.Parameter:
    kind = type(parameter)
    if kind is not nn.Parameter and issubclass(kind, nn.Parameter):  # with an attribute or two
        result = torch.Tensor._make_subclass(kind, parameter.detach(), requires_grad)
    else:
        result = nn.Parameter(parameter.detach(), requires_grad)
    vars(result).update(vars(parameter))
    return result
