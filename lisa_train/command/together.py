"""Several processes that make one run: what the first decides for all, and what is said once.

Whatever two processes could find out differently, or do to the same file at the same time (a folder
named by the clock, a cache that is being written, the copy of a settings file), one of them does,
and tells the others.
"""

import atexit
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from lisa_analysis.contract.errors import LisaError

T = TypeVar("T")

_LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_PATIENCE = timedelta(seconds=10)


class LostProcessError(LisaError):
    """Another process ended or hangs; why, that one knows best."""


def launched() -> int:
    """Return how many processes a launcher (torchrun, accelerate) has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def meet() -> None:
    """Let the processes that a launcher has started find each other, each on its device."""
    if launched() == 1 or processes() > 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def first_alone() -> bool:
    """Let the first of the launched processes be one by itself; return whether this is it.

    For what only one can do, before anything of the others' is looked at.
    """
    if launched() == 1:
        return True
    first = int(os.environ.get("RANK") or 0) == 0
    for name in [*os.environ]:
        if name in _LAUNCHED or name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_")):
            del os.environ[name]
    return first


def processes() -> int:
    """Return how many processes have found each other; nothing heavy is loaded to find out."""
    if "torch" not in sys.modules:
        return 1
    from lisa_train.model import parallel

    return parallel.processes()


def is_first() -> bool:
    """Whether this process decides and writes."""
    if processes() == 1:
        return True
    from lisa_train.model import parallel

    return parallel.is_first()


def agreed(decide: Callable[[], T]) -> T:
    """Return what the first process decides; what it refuses is refused in all.

    All processes call it together; a process of its own just decides.
    """
    if processes() == 1:
        return decide()
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = decide()
        except LisaError as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]  # type: ignore[no-any-return]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process through before the others, which find its files whole.

    Where it fails the others wait until its end ends them.
    """
    if processes() == 1:
        yield
        return
    import torch.distributed as dist

    if not is_first():
        dist.barrier()
    yield
    if is_first():
        dist.barrier()


def all_are_here() -> None:
    """Wait for the others."""
    if processes() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_are_done() -> None:
    """Wait for the others: a process that left early would cut off what it has sent last."""
    if processes() > 1:
        import torch.distributed as dist

        dist.barrier()
        atexit.unregister(_leave)
        atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        # Reducers of DDP in reference cycles go first: one that is the last to hold the group ends
        # it with the interpreter's lock in hand, which a thread of gloo may be waiting for.
        gc.collect()
        dist.destroy_process_group()


def is_to_say(sentence: str, *, consequence: bool = False) -> bool:
    """Whether this process is the one that says a sentence which all of them may have found.

    Parameters
    ----------
    sentence
        What is wrong.
    consequence
        Whether it only follows from what another process has met, and is not worth saying where
        any process has said something.
    """
    if launched() == 1:
        return True
    try:
        store = _store()
    except Exception:
        store = None
    if store is None:
        return True  # rather twice than never
    with suppress(Exception):
        said = store.add("lisa_train/said", 1)
        if consequence:
            return bool(said == 1)
        key = hashlib.sha256(sentence.encode()).hexdigest()
        return bool(store.add(f"lisa_train/said/{key}", 1) == 1)
    return True


def _store() -> Any:
    """Where the processes found each other: the launcher's own store, or the first process's."""
    import torch.distributed as dist

    of_the_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (of_the_launcher or (dist.is_available() and dist.is_initialized())):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=_PATIENCE)
