"""ImportanceProfile and its parts: what a profile says, in numbers and in words."""

import html
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.contract.paths import as_path, to_write
from lisa_analysis.profiles.parts import (
    Initialisation,
    ProfileRow,
    Reliability,
    StackShape,
)
from lisa_analysis.profiles.plain_values import to_plain
from lisa_analysis.profiles.thresholds import THRESHOLDS, Thresholds
from lisa_analysis.statistics import Concentration, Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lisa_analysis.profiles.seeds import Seeds

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ImportanceProfile:
    """Scores of layers under one metric, and what they are worth.

    Made by `importance` from a run, or by `from_scores`. A sequence of its rows:
    ``profile[3].score``, ``profile["embed"]``, ``len(profile)``. `to_frame()` has one row per
    layer: layer, name, score, low, high, joint_low, joint_high, n_eff, visits, initial, rho,
    steps, zeros, standing; NaN is unknown, never zero; a layer that was exactly zero throughout
    has the score 0 and no interval.
    `low` and `high` hold a layer's score by itself, `joint_low` and `joint_high` those of all
    layers at once, of what `estimand` says; `standing` is ``above``, ``below`` or ``within`` the
    others, ``unknown`` or ``zero``. `outside` holds the same for the embedding, head and final
    norm, which are no part of the stack. `sources` are the ids of the runs that it came from;
    `remarks` say what is special about single layers. `seeds` is what the runs behind a
    profile over seeds show each, None for a single run; `n_eff` counts seeds there.
    `agrees_with_ablation` says whether the run's own ablation ranks the layers so beyond chance,
    None where that is not known. `stacks` holds the shape of each stack where the model has several
    (an encoder and a decoder), and is empty for one: `verdict` and `shape` then name no course.
    """

    metric: str
    definition: str
    sources: tuple[str, ...]
    method: str
    model: str
    by: str
    confidence: float
    layers: pd.DataFrame = field(repr=False)
    outside: pd.DataFrame = field(repr=False)
    verdict: str
    statement: str
    concentration: Concentration = field(repr=False)
    shape: Shape = field(repr=False)
    initialisation: Initialisation | None = field(repr=False)
    reliability: Reliability = field(repr=False)
    samples: Array | None = field(repr=False)
    remarks: tuple[str, ...] = field(default=(), repr=False)
    thresholds: Thresholds = field(default=THRESHOLDS, repr=False)
    seeds: "Seeds | None" = field(default=None, repr=False)
    agrees_with_ablation: bool | None = field(default=None, repr=False)
    estimand: str = field(default="", repr=False)
    stacks: tuple[StackShape, ...] = field(default=(), repr=False)

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float] | Sequence[Sequence[float]] | Mapping[Any, float] | pd.Series,
        names: Sequence[str] | None = None,
        low: Sequence[float] | Mapping[Any, float] | pd.Series | None = None,
        high: Sequence[float] | Mapping[Any, float] | pd.Series | None = None,
        *,
        metric: str = "score",
        definition: str = "Scores that were given.",
        sources: Sequence[str] = (),
        model: str = "unknown",
        by: str = "layer",
        confidence: float = 0.95,
    ) -> "ImportanceProfile":
        """Make a profile of scores from anywhere: an ablation, two checkpoints, a paper.

        Parameters
        ----------
        scores
            One per layer, in the order of the stack; NaN is unknown, 0 is zero. A mapping, or a
            Series with an index of its own, names them: by names in order, or by the index of
            every layer in any. A list of lists holds the scores of several seeds: the profile is
            over seeds then, and bounds come from their spread.
        names
            Names of the layers as the model has them (for probabilities of a run of it);
            None takes those of the scores, or calls them ``layer 0`` and so on.
        low, high
            Bounds of the scores; NaN where there are none. Not for several seeds. Those that name
            their layers are put in the order of the scores.
        metric, definition
            What the scores are, as a name and in a sentence.
        sources
            What they come from, as run ids; of several seeds one each, or none.
        model, by, confidence
            The model, what a row is, and the coverage of the bounds.

        Raises
        ------
        LisaError
            When lengths or layers differ, names are given twice, a score is infinite, or a bound
            is on the wrong side.
        """
        from lisa_analysis.profiles.from_scores import profile_of

        return profile_of(
            scores, names, low, high, metric=metric, definition=definition, sources=sources,
            model=model, by=by, confidence=confidence,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> "ImportanceProfile":
        """Read a profile that was saved as `.json` or `.parquet`, all but its bootstrap samples.

        Raises
        ------
        LisaError
            When the file cannot be read or holds no profile: a `.csv` holds numbers alone.
        """
        from lisa_analysis.profiles.saved import read_profile

        return read_profile(as_path(path, "ImportanceProfile.load"))

    @property
    def run_id(self) -> str:
        """Run that it came from; several are listed."""
        return ", ".join(self.sources)

    @property
    def n_layers(self) -> int:
        """Rows of the profile: layers, or modules or tensors when those were asked for."""
        return len(self.layers)

    @property
    def scores(self) -> Array:
        """Shape (n_layers,), NaN where unknown."""
        return self.layers["score"].to_numpy(dtype=np.float64)

    @property
    def zero(self) -> tuple[int, ...]:
        """Layers that were observed and exactly zero throughout."""
        frame = self.layers
        never = frame["steps"].isna() | (frame["steps"] == 0)
        return tuple(np.flatnonzero((frame["score"] == 0) & never).tolist())

    @property
    def sufficient(self) -> bool:
        """Whether every layer has an interval, those that are zero throughout left out."""
        known = self.layers["low"].notna().to_numpy(copy=True)
        known[list(self.zero)] = True
        return bool(known.all()) and self.concentration.headroom.sufficient

    @property
    def above(self) -> tuple[int, ...]:
        """Rows that stand above the others, all judged at once."""
        return self._standing("above")

    @property
    def below(self) -> tuple[int, ...]:
        """Rows that stand below the others."""
        return self._standing("below")

    @property
    def unknown(self) -> tuple[int, ...]:
        """Rows without an interval, never seen or seen too little."""
        return self._standing("unknown")

    def _standing(self, word: str) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.layers["standing"].to_numpy() == word).tolist())

    @property
    def unseen(self) -> tuple[int, ...]:
        """Layers without any observation."""
        return tuple(np.flatnonzero(self.layers["score"].isna()).tolist())

    def to_frame(self) -> pd.DataFrame:
        """One row per layer; `attrs` say what the numbers are."""
        frame = self.layers.copy()
        frame.attrs = {
            "metric": self.metric,
            "definition": self.definition,
            "sources": list(self.sources),
            "confidence": self.confidence,
            "estimand": self.estimand,
            "coverage": f"{int(frame['score'].notna().sum())} of {len(frame)} {self.by}s observed",
        }
        return frame

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[ProfileRow]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int | str) -> ProfileRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ProfileRow, ...]: ...
    def __getitem__(self, index: int | str | slice) -> ProfileRow | tuple[ProfileRow, ...]:
        """Row of a layer, counted from 0 or from the end, or by its name; or a tuple of rows.

        Names are those of `to_frame()`, and of `outside`: ``embed``, ``head``, ``norm``.

        Raises
        ------
        IndexError
            For a layer that is not there.
        LisaError
            For an unknown name, and for anything but whole numbers, names and slices.
        """
        if isinstance(index, slice):
            return tuple(self[row] for row in range(len(self))[index])
        if isinstance(index, str):
            return self._named(index)
        try:
            row = operator.index(index)
        except TypeError:
            raise LisaError(
                f"a profile is indexed by whole numbers, names and slices, got {index!r}: "
                "to_frame() lists its rows."
            ) from None
        if not -len(self) <= row < len(self):
            raise IndexError(f"there is no {self.by} {row}: the profile has {len(self)}.")
        return ProfileRow.of(self.layers.iloc[row])

    def _named(self, name: str) -> ProfileRow:
        for frame in (self.layers, self.outside):
            places = np.flatnonzero((frame["name"] == name).to_numpy())
            if len(places) > 1:
                raise LisaError(f"{len(places)} rows of the profile are called {name!r}: count.")
            if len(places):
                return ProfileRow.of(frame.iloc[places[0]])
        known = [str(n) for frame in (self.layers, self.outside) for n in frame["name"]]
        raise LisaError(
            f"the profile has no row {name!r}: to_frame() lists its {len(self)} {self.by}s, "
            f"outside the rest.{suggest(name, known)}"
        )

    def plot(self, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the profile, see `lisa_analysis.plots.profile`."""
        from lisa_analysis import plots

        return plots.profile(self, ax=ax)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImportanceProfile):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.metric, self.sources, self.by, self.confidence, self.statement))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; unknown is None."""
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "metric",
                "definition",
                "run_id",
                "sources",
                "method",
                "model",
                "by",
                "confidence",
                "verdict",
                "statement",
                "remarks",
                "estimand",
            )
        }
        record["concentration"] = asdict(self.concentration)
        record["shape"] = asdict(self.shape)
        record["reliability"] = asdict(self.reliability)
        record["initialisation"] = self.initialisation and asdict(self.initialisation)
        record["stacks"] = [asdict(stack) for stack in self.stacks]
        record["thresholds"] = asdict(self.thresholds)
        record["seeds"] = self.seeds and self.seeds.to_dict()
        record["agrees_with_ablation"] = self.agrees_with_ablation
        record["layers"] = self.layers.to_dict("records")
        record["outside"] = self.outside.to_dict("records")
        plain: dict[str, Any] = to_plain(record)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the profile; the suffix of `path` says as what.

        `.json` and `.parquet` hold everything (`load` reads both; a Parquet reader sees the rows,
        layers first, then outside), `.csv` the rows, `.png` and `.svg` the picture of `plot`.

        Raises
        ------
        LisaError
            For any other suffix, and where the folder is missing.
        """
        from lisa_analysis.profiles.saved import write_profile

        return write_profile(self, to_write(path, "save"))

    def __repr__(self) -> str:
        return (
            f"<ImportanceProfile {self.metric} of {self.run_id or 'given scores'}: "
            f"{self.n_layers} {self.by}s, {self.verdict}, headroom {self.concentration.headroom}>"
        )

    def _repr_html_(self) -> str:
        table = self.layers.to_html(index=False, float_format=lambda v: f"{v:.3g}", border=0)
        title = f"{self.metric} of {self.run_id or 'given scores'}"
        return (
            f"<section><h3>{html.escape(title)}</h3>"
            f"<p>{html.escape(self.statement)}</p>"
            f"<details><summary>{self.n_layers} rows</summary>{table}</details></section>"
        )
