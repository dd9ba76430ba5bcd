"""Paged optimizer state of bitsandbytes, whose managed memory is never given back: used again.

bitsandbytes takes managed memory from CUDA, has no call that frees it, and keeps every buffer in
a list for the life of the process. State that LISA drops at a draw would stay allocated, and every
draw would add that of the layers drawn. Here the buffers of state that is gone serve the next.
"""

import math
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError

# What is replaced or called; a bitsandbytes without one of them is refused.
_NEEDED = ("init_state", "get_state_buffer", "page_mng")


class _Pool:
    """Managed memory of the process, lent to tensors and taken back when the last one is gone.

    A buffer serves any tensor of as many bytes on its device, so that never more is allocated
    than was in use at once of each size: the layers of one draw where the layers have the same
    shapes, and never more than state that is kept for all layers.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, Any], list[torch.Tensor]] = defaultdict(list)
        self._known: set[int] = set()

    def lend(self, allocate: Any, *shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        """Return a paged tensor, as `allocate` (bitsandbytes' `get_paged`) would; not cleared."""
        size = dtype.itemsize * math.prod(shape)
        free = self._free[size, device]
        whole = free.pop() if free else allocate(size, dtype=torch.uint8, device=device)
        self._known.add(whole.data_ptr())
        # The storage of whatever is made of it holds this array: it dies with the last of them.
        lent = whole.numpy()
        weakref.finalize(lent, free.append, whole).atexit = False
        paged: Any = torch.frombuffer(lent, dtype=dtype, count=math.prod(shape)).view(shape)
        paged.is_paged, paged.page_deviceid = True, device.index
        return paged  # type: ignore[no-any-return]

    def owns(self, value: Any) -> bool:
        """Whether a tensor lies in managed memory; a copy of one may still say `is_paged`."""
        return torch.is_tensor(value) and value.data_ptr() in self._known


# One for the process: what is allocated once serves the next training in it too.
_pool = _Pool()


class _NoList(list[torch.Tensor]):
    """Stands where bitsandbytes collects its paged tensors, which nothing of it ever reads."""

    def append(self, _: torch.Tensor) -> None:
        """Keep nothing: what is kept here is never freed."""


class PagedState:
    """Lets a paged optimizer of bitsandbytes take its buffers from a pool until it is closed.

    State that a checkpoint brought is paged again, too: bitsandbytes loads it into ordinary
    memory of the device.

    Parameters
    ----------
    optimizer
        A paged optimizer that `check_paged_state` accepts.
    """

    def __init__(self, optimizer: Any) -> None:
        import bitsandbytes.functional as functional

        self._optimizer = optimizer
        self._functional = functional
        self._manager, self._init_state = optimizer.page_mng, optimizer.init_state
        kind: Any = type(self._manager)
        optimizer.page_mng = kind.__new__(kind)
        optimizer.page_mng.paged_tensors = _NoList()
        optimizer.init_state = self._init_from_pool

    @torch.no_grad()
    def take_in(self, only: torch.Tensor | None = None) -> None:
        """Move state that lies in ordinary memory to where new state of its tensor would lie.

        Of all tensors, or of `only` one.
        """
        for g, group in enumerate(self._optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                loaded = self._optimizer.state.get(parameter)
                if loaded and (only is None or only is parameter):
                    self._page(loaded, group, parameter, g, i)

    def close(self) -> None:
        """Leave the optimizer as bitsandbytes made it; what was lent stays valid."""
        self._optimizer.page_mng = self._manager
        del self._optimizer.init_state

    def _page(self, state: dict[str, Any], group: Any, parameter: Any, g: int, i: int) -> None:
        strays = [
            key
            for key, value in state.items()
            if torch.is_tensor(value) and key.startswith("state") and not _pool.owns(value)
        ]
        if not strays:
            return
        # bitsandbytes decides what is paged: let it make new state, and fill that.
        del self._optimizer.state[parameter]
        self._optimizer.init_state(group, parameter, g, i)
        fresh = self._optimizer.state[parameter]
        for key in strays:
            old, new = state[key], fresh.get(key)
            old.is_paged = False  # copies inherit the mark
            if _pool.owns(new) and (old.shape, old.dtype) == (new.shape, new.dtype):
                state[key] = new.copy_(old)
        self._optimizer.state[parameter] = state

    def _init_from_pool(self, *args: Any, **kwargs: Any) -> Any:
        allocate = self._functional.get_paged

        def lend(*shape: int, dtype: torch.dtype = torch.float32, device: Any) -> torch.Tensor:
            return _pool.lend(allocate, *shape, dtype=dtype, device=device)

        self._functional.get_paged = lend
        try:
            return self._init_state(*args, **kwargs)
        finally:
            self._functional.get_paged = allocate


def check_paged_state(optimizer: Any) -> None:
    """`ConfigError` for a paged optimizer that allocates in another way than is known here."""
    if not getattr(optimizer, "is_paged", False):
        return
    import bitsandbytes.functional as functional

    missing = [name for name in _NEEDED if not hasattr(optimizer, name)]
    if not hasattr(functional, "get_paged"):
        missing.append("functional.get_paged")
    if missing:
        raise ConfigError(
            f"LISA cannot use the memory of paged state again under {type(optimizer).__name__}: "
            f"this bitsandbytes has no {' and no '.join(missing)}, and the memory of every draw "
            "would stay allocated; take an optimizer that is not paged (optim: adamw_bnb_8bit)."
        )


def paged_state_of(optimizer: Optimizer) -> PagedState | None:
    """Return the pool's hold on `optimizer`, or None where its state is not paged."""
    return PagedState(optimizer) if getattr(optimizer, "is_paged", False) else None
