"""Old module paths keep working, with a DeprecationWarning that names the new (stdlib only)."""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def redirect(package: str, moved: Mapping[str, str]) -> None:
    """Let modules of `package` be imported by their old names.

    Parameters
    ----------
    package
        Name of the package, as `lisa_train`.
    moved
        Old path below the package to the new one, as ``{"memory": "estimate"}``.
    """
    table = {f"{package}.{old}": f"{package}.{new}" for old, new in moved.items()}
    # Last: only what no file answers to is looked up here.
    sys.meta_path.append(_OldNames(table))


class _OldModule(ModuleType):
    """A module under its old name, which may be that of a function of its package as well.

    Importing ``lisa_analysis.report`` takes the place of the function `lisa_analysis.report`,
    which is then still to be called by that name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the package's function of this name."""
        package, _, name = self.__name__.rpartition(".")
        return sys.modules[package].__getattr__(name)(*args, **kwargs)


class _OldNames:
    """Finds a module under its old name and hands out the module under its new one.

    A finder and a loader without the base classes of `importlib.abc`, which take longer to import
    than the package.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for old names alone."""
        if fullname not in self.table:
            return None
        return ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module that took the place of an old name."""
        new = self.table[spec.name]
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        module = _OldModule(spec.name)
        module.__dict__["_moved_to"] = importlib.import_module(new)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Fill the old module with the names of the new one."""
        new = module.__dict__.pop("_moved_to")
        module.__dict__.update(
            {name: value for name, value in vars(new).items() if not name.startswith("__")}
        )
        # Names that the new module loads late.
        if hasattr(new, "__getattr__"):
            module.__dict__["__getattr__"] = new.__getattr__
