"""The registry of exports: what one is, which there are, and `export`."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.contract.paths import to_write, whole_file
from lisa_analysis.contract.schema import SCHEMA_VERSION
from lisa_analysis.plans.exports.plan import Plan
from lisa_analysis.plans.exports.yaml_text import to_yaml

if TYPE_CHECKING:
    from lisa_analysis.profiles.profile import ImportanceProfile


@dataclass(frozen=True)
class Content:
    """What an exporter returns.

    Attributes
    ----------
    values
        The file as plain values.
    notes
        Sentences for the person who uses it.
    shares
        What every layer got, None where that is not one number each.
    facts
        Further numbers for the provenance.
    text
        The file as text, where it is not simply its values.
    """

    values: Any
    notes: tuple[str, ...] = ()
    shares: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None


@dataclass(frozen=True)
class Exporter:
    """One kind of file: how it is made, and where its provenance goes.

    Attributes
    ----------
    kind, help
        Its name, and what it is for.
    make
        Takes a `Plan` and its own options, and returns a `Content`.
    syntax
        ``json`` or ``yaml``.
    provenance
        ``inside`` the file (a key of JSON, comments of YAML), or ``beside`` it where the tool that
        reads it would not have a key of its own.
    """

    kind: str
    help: str
    make: Callable[..., Content]
    syntax: str = "json"
    provenance: str = "inside"

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that it takes beside those that all take."""
        return tuple(inspect.signature(self.make).parameters)[1:]


EXPORTS: dict[str, Exporter] = {}
"""Exports by their kind."""

_Make = TypeVar("_Make", bound=Callable[..., Content])
SHARED = ("run", "strength", "control", "seed", "use_intervals")
"""Options that all kinds take."""


def exporter(
    kind: str, help: str, *, syntax: str = "json", provenance: str = "inside"
) -> Callable[[_Make], _Make]:
    """Add a kind of file to `EXPORTS`; a decorator of the function that makes it.

    Parameters
    ----------
    kind, help
        Name at `lisa_analysis.export` and ``--export``, and what it is for in one line.
    syntax, provenance
        See `Exporter`.

    Examples
    --------
    >>> from lisa_analysis.plans.exports import Content, exporter
    >>> @exporter("order", "layers from the most to the least important")
    ... def order(plan):
    ...     return Content({"layers": plan.evidence.score.argsort()[::-1].tolist()})
    >>> _ = EXPORTS.pop("order")
    """

    def register(make: _Make) -> _Make:
        known = EXPORTS.get(kind)
        if known is not None and known.make.__module__ != make.__module__:
            raise LisaError(f"there is an export {kind!r} already: choose another name.")
        EXPORTS[kind] = Exporter(kind, help, make, syntax, provenance)
        return make

    return register


@dataclass(frozen=True)
class Export:
    """A file for another tool; `save` writes it.

    Attributes
    ----------
    kind
        Of which kind.
    values
        The file as plain values, without provenance.
    text
        The file.
    statement
        What a person should know: whether the profile is undecided, and the notes of the kind.
    provenance
        Where it came from: profile, settings, share of every layer.
    beside
        Whether the provenance is written to a file of its own, ``NAME.about.json``.
    """

    kind: str
    values: Any = field(repr=False)
    text: str = field(repr=False)
    statement: str
    provenance: Mapping[str, Any] = field(repr=False)
    beside: bool = False

    def save(self, path: str | Path) -> Path:
        """Write the file, and its provenance beside it where the file cannot hold it."""
        path = to_write(path, "save")
        with whole_file(path) as file:
            file.write_text(self.text, encoding="utf-8")
            if self.beside:  # in its place before the file that it is about
                about = json.dumps(self.provenance, indent=2, ensure_ascii=False, allow_nan=False)
                with whole_file(path.with_name(f"{path.stem}.about.json")) as beside:
                    beside.write_text(about + "\n", encoding="utf-8")
        return path


def export(profile: "ImportanceProfile", kind: str, **options: Any) -> Export:
    """Turn a profile into the configuration of another tool.

    An undecided profile gives the uniform choice (equal ranks, all layers, multipliers of 1), and
    the file and its statement say so.

    Parameters
    ----------
    profile
        A profile by layer, with the names of the model's layers.
    kind
        One of `EXPORTS`: ``peft-rank``, ``peft-layers``, ``freeze``, ``axolotl``,
        ``llamafactory``, ``lr``, ``mergekit`` or ``probabilities``.
    **options
        For all kinds: `run`, the run directory (opened or its path) that says which modules the
        model has and how large they are; `strength`, `control`, `seed` and `use_intervals` as
        in `sampling_probabilities`. The others are those of the kind, see `docs/steering.md`.

    Returns
    -------
    Export
        `save(path)` writes it.

    Raises
    ------
    LisaError
        For an unknown kind or option, a profile that is not by layer or whose layers have no
        names, or a budget that cannot be met.
    """
    if kind not in EXPORTS:
        raise LisaError(
            f"there is no export {kind!r}: expected one of {', '.join(EXPORTS)}."
            + suggest(str(kind), EXPORTS)
        )
    chosen = EXPORTS[kind]
    shared = {name: options.pop(name) for name in SHARED if name in options}
    for name in options:
        if name not in chosen.options:
            known = (*chosen.options, *SHARED)
            raise LisaError(
                f"export {kind!r} has no option {name!r}: expected {', '.join(known)}."
                + suggest(name, known)
            )
    plan = Plan.of(profile, **shared)
    made = chosen.make(plan, **options)
    statement = _statement(plan, made)
    provenance = _provenance(plan, chosen, made, statement, options)
    beside = chosen.provenance == "beside"
    return Export(
        kind, made.values, _text(chosen, made, statement, provenance, beside), statement,
        provenance, beside,
    )  # fmt: skip


def _statement(plan: Plan, made: Content) -> str:
    said = []
    if plan.undecided:
        said.append(
            f"Undecided: {plan.undecided}. This is the uniform choice; --ignore-intervals "
            "(use_intervals=False) takes the scores as certain."
        )
    elif plan.evidence.doubt:
        said.append(f"The scores are taken as certain, although {plan.evidence.doubt}.")
    if plan.profile.reliability.drift and not plan.undecided:
        said.append("The profile drifted during the run: its scores are averages of stages.")
    if plan.control is not None:
        said.append(f"A {plan.control} control: a placebo, not meant to be better than uniform.")
    return " ".join([*said, *made.notes])


def _provenance(
    plan: Plan, chosen: Exporter, made: Content, statement: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    from lisa_analysis.profiles.plain_values import to_plain

    profile = plan.profile
    about = {
        "kind": chosen.kind,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": profile.model,
        "metric": profile.metric,
        "source_runs": list(profile.sources),
        "verdict": profile.verdict,
        "undecided": plan.undecided,
        "statement": statement,
        "strength": plan.strength,
        "control": plan.control,
        "seed": plan.seed,
        "options": {k: v for k, v in options.items() if isinstance(v, int | float | str | list)},
        "layers": list(profile.layers["name"]),
        "scores": profile.scores,
        **made.facts,
    }
    if made.shares is not None:
        about["shares"] = np.asarray(made.shares)
    plain: dict[str, Any] = to_plain(about)
    return plain


def _text(
    chosen: Exporter, made: Content, statement: str, provenance: Mapping[str, Any], beside: bool
) -> str:
    if made.text is not None:
        return made.text
    if chosen.syntax == "yaml":
        head = [
            f"{chosen.kind} of {provenance['metric']}, made by lisa-analyze from "
            f"{', '.join(provenance['source_runs']) or 'given scores'} ({provenance['model']})",
            statement,
            f"provenance: {json.dumps(provenance, ensure_ascii=False, allow_nan=False)}",
        ]
        lines = [f"# {line}" for part in head for line in part.splitlines() if line]
        return "\n".join(lines) + "\n" + to_yaml(made.values)
    values = made.values if beside else {**made.values, "provenance": provenance}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
