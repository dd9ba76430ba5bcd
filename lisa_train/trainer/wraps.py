"""What a callback cannot reach: wraps on one object's methods, its plain state."""

import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

_DATA = frozenset({"train_dataset", "eval_dataset"})
# Subclasses of others may refuse to be cleared (transformers' ModelOutput does).
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set})


class _Chain:
    """What stands for one method of one object: wrappers around it, in the order of their coming.

    Whoever leaves first takes only its own wrapper along; the last one to leave gives the object
    its own method back, where nobody else has put something over the chain.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._original = getattr(owner, name)
        self._had_own = name in vars(owner)
        self.wrappers: list[Callable[..., Any]] = []
        functools.update_wrapper(self, self._original)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._original
        for wrapper in self.wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    def remove(self, wrapper: Callable[..., Any]) -> None:
        self.wrappers.remove(wrapper)
        if self.wrappers or vars(self._owner).get(self._name) is not self:
            return
        if self._had_own:
            setattr(self._owner, self._name, self._original)
        else:
            delattr(self._owner, self._name)


class Wraps:
    """Functions put around methods of single objects; their classes stay as they are.

    Several of them may wrap one method, and be taken off in any order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Let `wrapper(original, *args, **kwargs)` stand for `owner.name`."""
        chain = vars(owner).get(name)
        if not isinstance(chain, _Chain):
            chain = _Chain(owner, name)
        own = functools.partial(wrapper)  # told apart from the same function put twice
        chain.wrappers.append(own)
        self._undo.append(functools.partial(chain.remove, own))

    def take_off(self) -> None:
        """Restore everything, the last first; safe to call twice."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def plain_state_kept(owner: Any) -> Iterator[None]:
    """Put back the plain attributes of `owner` afterwards, and what its containers hold.

    Counters and lists of metrics, as TRL's trainers fill in `compute_loss`, are attributes or lie
    in dicts, lists and deques. Objects and tensors that are changed in place stay changed, and
    data sets are not looked into.
    """
    attributes = dict(vars(owner))
    containers: dict[int, tuple[Any, Any]] = {}
    for name, value in attributes.items():
        if name not in _DATA:
            _copy_containers(value, containers)
    try:
        yield
    finally:
        for name in vars(owner).keys() - attributes.keys():
            delattr(owner, name)
        vars(owner).update(attributes)
        for container, content in containers.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)


def _copy_containers(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    if type(value) not in _CONTAINERS or id(value) in found:
        return
    found[id(value)] = (value, copy(value))
    for item in list(value.values() if isinstance(value, dict) else value):
        _copy_containers(item, found)
