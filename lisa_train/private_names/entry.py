"""One name of another library that is not promised to stay."""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """One name of another library.

    Attributes
    ----------
    area
        The part of this package that needs it; what `check` is asked for.
    owner
        Module, or module and class (``"torch.nn:Module"``).
    name
        Its attribute, parameter or key.
    users
        Modules of this package that use it.
    without
        What is not done, or is wrong, when the name is gone.
    refused
        Whether nothing may start then; else a warning is enough, because what is recorded and
        trained stays right.
    in_source
        The name is no attribute of the owner (set on instances, a parameter, a key): it is looked
        for in the text of the module.
    if_loaded
        Nobody can be using it unless the module has been imported already.
    """

    area: str
    owner: str
    name: str
    users: tuple[str, ...]
    without: str
    refused: bool = True
    in_source: bool = False
    if_loaded: bool = False

    @property
    def library(self) -> str:
        """Name of the package that it belongs to."""
        return self.owner.split(":")[0].split(".")[0]

    def exists(self) -> bool:
        """Whether it is there; True where the library is not in use, or shows no source."""
        module_name, _, kind = self.owner.partition(":")
        if self.if_loaded and module_name not in sys.modules:
            return True
        if self.library not in sys.modules and importlib.util.find_spec(self.library) is None:
            return True
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return False
        owner: Any = getattr(module, kind, None) if kind else module
        if owner is None:
            return False
        if self.in_source:
            source = _source(module_name)
            return source is None or re.search(rf"\b{re.escape(self.name)}\b", source) is not None
        return hasattr(owner, self.name)

    def __str__(self) -> str:
        kind = self.owner.partition(":")[2] or self.owner
        return f"{kind}.{self.name}"


@functools.cache
def _source(module_name: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[module_name])
    except (OSError, TypeError):
        return None
