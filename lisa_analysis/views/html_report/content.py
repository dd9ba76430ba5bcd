"""What the report says of one run: facts, findings, figures; gathered, never computed here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lisa_analysis.contract.schema import CONFIG, METRICS_TABLE
from lisa_analysis.metrics.step_tables import StepTable
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.runs.diagnostics import Diagnostics
from lisa_analysis.views.analysis import RunAnalysis
from lisa_analysis.views.headlines import headline
from lisa_analysis.views.html_report import figures, over_time
from lisa_analysis.views.html_report.figure import Budget, ReportFigure
from lisa_analysis.views.html_report.format import redact
from lisa_analysis.views.html_report.worth import worth_figures, worth_words
from lisa_analysis.views.states import STATES as STATES

if TYPE_CHECKING:
    from lisa_analysis import Run

METHODS = {
    "lisa": "LISA", "lora": "LoRA", "full": "full fine-tuning", "peft": "another method of PEFT",
    "select": "selected tensors",
}  # fmt: skip

# A profile by module holds (steps × modules) numbers per column: not for the longest logs.
_MOST_MODULE_ROWS = 20_000_000


@dataclass(frozen=True)
class RunContent:
    """Everything that the page shows of one run."""

    run: "Run"
    slug: str
    name: str
    diagnostics: Diagnostics
    profile: ImportanceProfile | None
    why_no_profile: str | None
    facts: list[tuple[str, Any]]
    profile_figures: list[ReportFigure]
    heatmaps: list[ReportFigure]
    schedule: ReportFigure | None
    learned: ReportFigure | None
    curves: list[ReportFigure]
    worth_words: list[str] = field(default_factory=list)
    worth_figures: list[ReportFigure] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    recorded: frozenset[str] = frozenset()

    @property
    def findings(self) -> list[Any]:
        """Findings, worst first; those of one state keep the order of the rules."""
        order = list(STATES)
        return sorted(self.diagnostics.findings, key=lambda finding: order.index(finding.state))

    @property
    def counts(self) -> list[tuple[str, int]]:
        """(state, number of findings) for the states that occur, worst first."""
        states = [finding.state for finding in self.diagnostics.findings]
        return [(state, states.count(state)) for state in STATES if state in states]

    @property
    def worst(self) -> str:
        """State of the whole run; a run that could not be checked at all is not ok."""
        for state in ("fail", "warn"):
            if any(state == found for found, _ in self.counts):
                return state
        if not self.run.has_course:
            return "ok"
        return "ok" if any(state in ("ok", "info") for state, _ in self.counts) else "could not run"

    @property
    def confirmed(self) -> bool | None:
        """Whether the run's own ablation ranks the layers as its profile does; None: unknown."""
        return None if self.profile is None else self.profile.agrees_with_ablation

    @property
    def headline(self) -> str:
        """The verdict in a sentence that names layers."""
        if self.profile is None:
            return "No profile"
        return headline(self.profile)

    @property
    def open_question(self) -> bool:
        """Whether the profile leaves some layer open: a healthy run is not a known profile."""
        profile = self.profile
        return profile is None or profile.verdict == "undecided" or bool(profile.unknown)

    @property
    def why(self) -> str:
        """The reasons behind the headline, in sentences."""
        if self.profile is None:
            return f"There is no profile: {self.why_no_profile}"
        return self.profile.statement

    @property
    def start_statement(self) -> str | None:
        """What was there at step 0, in words; None when the verdict says it already."""
        start = None if self.profile is None else self.profile.initialisation
        if self.profile is None or start is None or start.statement in self.profile.statement:
            return None
        return start.statement

    @property
    def figures(self) -> Iterator[ReportFigure]:
        """Every figure, in the order of the page."""
        yield from self.profile_figures
        yield from self.worth_figures
        yield from self.heatmaps
        if self.schedule is not None:
            yield self.schedule
        if self.learned is not None:
            yield self.learned
        yield from self.curves


@dataclass(frozen=True)
class Trouble:
    """One rule's finding in the runs where it fired."""

    finding: Any
    evidence: list[tuple[str, str]]

    @property
    def same(self) -> bool:
        """Whether all runs show it in the same words."""
        return len({text for _, text in self.evidence}) == 1


def troubles(contents: Sequence[RunContent]) -> list[Trouble]:
    """Problems and warnings of several runs, each rule once per state, worst first."""
    found: dict[tuple[int, str], Trouble] = {}
    for content in contents:
        for finding in content.findings:
            if finding.state in ("fail", "warn"):
                key = (list(STATES).index(finding.state), finding.id)
                trouble = found.setdefault(key, Trouble(finding, []))
                trouble.evidence.append((content.name, finding.evidence))
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def gather(analysis: RunAnalysis, position: int, budget: Budget, *, alone: bool) -> RunContent:
    """Draw the figures of one run and put beside them what there is to say.

    Parameters
    ----------
    analysis
        What was found in the run.
    position
        Place among the runs of the report.
    budget
        How finely to draw.
    alone
        Whether it is the only run; curves of several runs share their figures instead.
    """
    run, slug = analysis.run, f"r{position}"
    names = run.layer_names
    shown = run.has_course and run.has_layers
    heatmaps = _heatmaps(analysis, slug, budget) if shown else []
    schedule = learned = None
    if analysis.drew_layers:
        schedule = over_time.schedule_figure(f"{slug}-schedule", run, names, budget)
        learned = over_time.learned_figure(f"{slug}-learned", run, names, budget)
    return RunContent(
        run,
        slug,
        analysis.name,
        analysis.diagnostics,
        analysis.profile,
        None if analysis.why_no_profile is None else str(analysis.why_no_profile),
        _facts(run),
        _profile_figures(analysis, slug, alone=alone),
        heatmaps,
        schedule,
        learned,
        _curves(analysis, slug, budget) if alone else [],
        worth_words(analysis.worth, analysis.worth_by_module),
        worth_figures(slug, analysis.worth, analysis.worth_by_module, names),
        _limits(run, analysis.table),
        frozenset(analysis.table.measures),
    )


def _heatmaps(analysis: RunAnalysis, slug: str, budget: Budget) -> list[ReportFigure]:
    """What was measured over layers and steps; of sparse runs the schedule is shown once, alone."""
    names = analysis.run.layer_names
    columns = ["grad_norm", "update_norm"]
    # LISA's weights move at visits alone, which the updates show.
    if not analysis.drew_layers:
        columns.append("delta_norm" if _has_adapters(analysis.run) else "weight_norm")
    grids = dict(analysis.grids(columns)) | {"update_norm": analysis.updates}
    draw = over_time.visits_figure if analysis.drew_layers else over_time.heatmap_figure
    found = [draw(f"{slug}-{c}", grids[c], names, budget) for c in columns]
    return [figure for figure in found if figure.image is not None]


def _curves(analysis: RunAnalysis, slug: str, budget: Budget) -> list[ReportFigure]:
    run = analysis.run
    found = [
        over_time.curve_figure(f"{slug}-loss", run, "loss", budget),
        over_time.curve_figure(f"{slug}-learning-rate", run, "learning_rate", budget),
        over_time.curve_figure(f"{slug}-grad", run, "grad_norm", budget),
        over_time.ratio_figure(f"{slug}-ratio", analysis.update_ratio, budget),
        over_time.curve_figure(f"{slug}-recorder", run, "recorder", budget),
    ]
    return [figure for figure in found if figure is not None]


def _profile_figures(analysis: RunAnalysis, slug: str, *, alone: bool) -> list[ReportFigure]:
    if analysis.profile is None:
        return []
    names = analysis.run.layer_names
    found = [figures.profile_figure(f"{slug}-profile", analysis.profile, names)]
    if analysis.probe_change is not None:
        found.append(figures.change_figure(f"{slug}-change", analysis.probe_change, names))
    if alone and found[0].image is not None and analysis.table.rows <= _MOST_MODULE_ROWS:
        by_module = analysis.profile_by_module
        if by_module is not None:
            found.append(figures.kind_figure(f"{slug}-kinds", by_module))
    return found


def _has_adapters(run: "Run") -> bool:
    roles = run.parameters["role"]
    return bool((roles != "base").any())


def _facts(run: "Run") -> list[tuple[str, Any]]:
    """Who, what, where and when, from the manifest; what is unknown is left out."""
    manifest = run.manifest
    model = mapping(manifest, "model")
    hardware = mapping(manifest, "hardware")
    dataset = mapping(manifest, "dataset")
    device = " ".join(str(hardware[k]) for k in ("device", "name") if hardware.get(k))
    rows = [
        ("run", run.run_id),
        ("model", _last_part(model.get("name"))),
        ("architecture", model.get("architecture")),
        ("method", _method(run)),
        ("layers", run.n_layers),
        ("data", _last_part(dataset.get("name"))),
        ("hardware", device or None),
        ("started", str(manifest.get("created") or "")[:19].replace("T", " ")),
        ("status", run.status),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _last_part(name: Any) -> str | None:
    """Name of a folder without the way to it; other names, as ``org/model``, stay whole."""
    return Path(str(name)).name if name and Path(str(name)).is_absolute() else name


def _method(run: "Run") -> str:
    """Name the method with the settings that define it."""
    lisa, lora = mapping(run.manifest, "lisa"), mapping(run.manifest, "lora")
    if run.method == "lisa" and lisa:
        k, steps = lisa.get("activated_layers", "?"), lisa.get("interval_steps", "?")
        how = ", probabilities learned meanwhile" if lisa.get("learn") else ""
        if lisa.get("control", "none") != "none":
            how += f" ({lisa['control']} control)"
        return f"LISA, {k} layers for {steps} steps at a time{how}"
    if run.method == "lora" and lora:
        return f"LoRA, r = {lora.get('r', '?')}"
    peft, select = mapping(run.manifest, "peft"), mapping(run.manifest, "select")
    if run.method == "peft" and peft.get("peft_type"):
        return f"{peft['peft_type']} of PEFT"
    if run.method == "select" and select.get("chosen_tensors"):
        return f"{select['chosen_tensors']} selected tensors"
    return str(METHODS.get(run.method, run.method))


def mapping(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Entry of a manifest that should be a mapping; empty when it is absent or is not."""
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _limits(run: "Run", table: StepTable) -> list[str]:
    """What the reader of this run must know was not seen."""
    limits = [str(warning) for warning in run.warnings]
    if run.status != "finished":
        limits.append(f"The run is {run.status}: everything here is as far as it got.")
    if not run.has_course:
        return [*limits, "There are weights alone: no step, loss or gradient of their training."]
    if not run.has_layers:
        return [*limits, "This is the log of another trainer: no layer was recorded."]
    if not len(table.steps):
        return [*limits, "No training step was recorded."]
    seen = set(table.measures)
    if np.isfinite(table.final_merged).any():  # in a census, which is no recorded step
        seen.add("merged_norm")
    recorded = [c for c in METRICS_TABLE.names[2:] if c in seen]
    missing = [c for c in METRICS_TABLE.names[2:] if c not in seen]
    limits.append(
        f"{len(table.steps):,} of the optimizer steps up to {table.steps[-1]:,} were recorded, "
        f"with {', '.join(recorded)}; not measured: {', '.join(missing) or 'nothing'}."
    )
    trained = np.asarray(table.trained[:, : run.n_layers].any(axis=0))
    never = np.flatnonzero(~trained).tolist()
    if never:
        limits.append(f"Layers never trained while recording: {', '.join(map(str, never))}.")
    if _has_adapters(run):
        limits.append(
            "Norms of an adapter run are those of its adapters: they compare with other adapter "
            "runs of the same rank, not with full fine-tuning."
        )
    return limits


def reproduction(run: "Run") -> list[tuple[str, str]]:
    """Command, configuration and versions that repeat the run, secrets redacted."""
    found = []
    if run.manifest.get("command"):
        command = run.manifest["command"]
        text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        found.append(("command", redact(text)))
    for key in ("versions", "seeds", "hardware", "dataset"):
        entries = mapping(run.manifest, key)
        if entries:
            found.append((key, "\n".join(f"{k}: {redact(v)}" for k, v in entries.items())))
    try:
        config = (run.path / CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    return [*found, (CONFIG, redact(config))]
