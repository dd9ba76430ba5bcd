"""`SelectConfig`: what `method: select` trains, by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of, real, whole

GROUPS = ("embed", "head", "norm", "other")
_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class SelectConfig:
    """What trains; everything else rests. What several settings name is put together.

    Parameters
    ----------
    layers
        Layers by index, from 0: ``0-3,11``, one number, or a list of numbers.
    last
        The last so many layers; in an encoder-decoder, of each stack.
    even
        So many layers spread evenly over the depth, of each stack: the middle one of so many equal
        parts (6 of 30 are 2, 7, 12, 17, 22 and 27).
    top
        So many layers with the highest scores in the file `profile`.
    profile
        A profile that was saved as .json, or a probabilities file, of this model's layers.
    spectrum
        Spectrum's choice (arXiv 2406.06623): of each kind of matrix in the layers this share, at
        most 1, that has the highest signal to noise by the singular values of the weights as they
        were loaded. Its authors train embeddings and head beside them: name `groups` for that.
    tensors
        Regular expressions; a tensor trains whose whole name one of them matches (``.*bias`` is
        BitFit, arXiv 2106.10199).
    groups
        What lies outside the layers: any of ``embed``, ``head``, ``norm`` and ``other``. A head
        that is tied to the embeddings is the same matrix.
    stack
        Path of the list that holds the layers, where the model's structure leaves it open.
    """

    layers: str | int | list[int] | None = None
    last: int = 0
    even: int = 0
    top: int = 0
    profile: str | None = None
    spectrum: float = 0.0
    tensors: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    stack: str | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _as_ranges(layer_indices(self.layers)))
        for name in ("last", "even", "top"):
            whole(f"select.{name}", getattr(self, name), " of at least 0", 0)
        share = real("select.spectrum", self.spectrum, "a share from 0 to 1, as 0.25")
        if not 0 <= share <= 1:
            raise ConfigError(f"select.spectrum is {share}, but must be a share from 0 to 1.")
        object.__setattr__(self, "spectrum", share)
        for name in ("tensors", "groups"):
            value: Any = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if isinstance(self.profile, PathLike):
            object.__setattr__(self, "profile", fspath(self.profile))
        for group in self.groups:
            one_of("select.groups", group, GROUPS)
        for pattern in self.tensors:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"select.tensors holds {pattern!r}, which is no regular expression ({error})."
                ) from None
        if bool(self.top) != (self.profile is not None):
            raise ConfigError(
                "select.top and select.profile go together: the number of layers, and the file "
                "with their scores."
            )

    @property
    def names_something(self) -> bool:
        """Whether anything is to train at all."""
        named = (self.last, self.even, self.top, self.spectrum, self.tensors, self.groups)
        return self.layers is not None or any(named)


def layer_indices(given: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return the indices that ``0-3,11``, a number or a list of numbers stands for, in order.

    >>> layer_indices("0-3,11")
    (0, 1, 2, 3, 11)
    """
    found: set[int] = set()
    parts = given.split(",") if isinstance(given, str) else None
    if parts is None:
        listed = [given] if isinstance(given, int) or not isinstance(given, Iterable) else given
        parts = [str(part) for part in listed]
    for part in parts:
        match = _RANGE.fullmatch(part)
        low = int(match[1]) if match else -1
        high = int(match[2]) if match and match[2] is not None else low
        if match is None or high < low:
            raise ConfigError(
                f"select.layers holds {part.strip()!r}; expected indices from 0 and ranges of "
                "them, as '0-3,11'."
            )
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _as_ranges(indices: tuple[int, ...]) -> str:
    """Write indices as `layer_indices` reads them, neighbours as a range."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
