"""A folder as a registry: every module in it is imported, and registers what it has."""

import importlib
import pkgutil
from collections.abc import Iterable


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module and folder of a package, in the order of their names.

    Parameters
    ----------
    package, path
        `__name__` and `__path__` of the package, whose `__init__` calls this.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
