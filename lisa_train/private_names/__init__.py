"""Names of other libraries that are not promised to stay: who uses them, and what fails without.

Torch, transformers, TRL, PEFT, accelerate, bitsandbytes and schedulefree may rename any of these in
a minor release. `check` is called where a part that needs them starts, and says so in words; a
test per name holds the versions that are pinned.
"""

import warnings
from importlib import metadata

from lisa_analysis.contract.errors import ConfigError
from lisa_train.private_names.entry import PrivateName
from lisa_train.private_names.table import TABLE

__all__ = ["TABLE", "PrivateName", "check"]


def check(*areas: str) -> None:
    """Say in words which private names of these areas the installed versions lack.

    Raises
    ------
    ConfigError
        For a name without which something would be wrong or hang; for the others a
        `RuntimeWarning`.
    """
    for entry in TABLE:
        if entry.area in areas and not entry.exists():
            text = (
                f"{entry.library} {_version(entry.library)} has no {entry}, and without it "
                f"{entry.without}"
            )
            if entry.refused:
                raise ConfigError(
                    f"{text}; install a version that this package was made for, see its "
                    "constraints, or report it."
                )
            warnings.warn(f"{text}.", RuntimeWarning, stacklevel=3)


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(unknown version)"
