"""The report on an ablation: what the layers were worth, what they cost, and who predicted it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from lisa_analysis import plots
from lisa_analysis.views.html_report import readout, svg
from lisa_analysis.views.html_report.figure import HALF, NARROW, WIDE, ReportFigure, canvas
from lisa_analysis.views.html_report.figures import kind_figure
from lisa_analysis.views.html_report.format import correlation, number
from lisa_analysis.views.html_report.tables import Table, frame_table
from lisa_analysis.views.plots.ablations import NAMES
from lisa_analysis.views.plots.style import legend

# Draws into axes under a name, and returns the picture and what is read out of it.
Drawn = Callable[[str, Axes], tuple[Markup, Markup]]
Size = dict[str, float]
# Figures of more levels would say the same thing again.
_TARGETS = {"ablation_keep": "keep", "ablation_reset": "reset"}


def worth_figures(
    slug: str,
    by_layer: Mapping[str, Any],
    by_module: Mapping[str, Any],
    layer_names: Sequence[str],
) -> list[ReportFigure]:
    """What each layer's change was worth, its cost elsewhere, and where in the layer it sits."""
    found = []
    task = {metric: by_layer[metric] for metric in _TARGETS if metric in by_layer}
    if task:
        found.append(_worth_figure(f"{slug}-worth", task, by_layer, layer_names))
    for gain in ("ablation_reset", "ablation_keep"):
        cost = "forgetting" if gain == "ablation_reset" else "forgetting_keep"
        if gain in by_layer and cost in by_layer:
            found.append(
                _trade_figure(f"{slug}-trade", by_layer[gain], by_layer[cost], layer_names)
            )
            break
    for metric in _TARGETS:
        if metric in by_module:
            found.append(kind_figure(f"{slug}-worth-kinds", by_module[metric]))
            break
    return found


def worth_words(by_layer: Mapping[str, Any], by_module: Mapping[str, Any]) -> list[str]:
    """Sentences: one profile of each text says the rest."""
    said = [by_layer[m].statement for m in ("ablation_keep", "ablation_reset") if m in by_layer][:1]
    said += [by_layer[m].statement for m in ("forgetting", "forgetting_keep") if m in by_layer][:1]
    if not said:
        said = [profile.statement for profile in by_module.values()][:1]
    return said


def _worth_figure(
    slug: str, task: Mapping[str, Any], by_layer: Mapping[str, Any], layer_names: Sequence[str]
) -> ReportFigure:
    title = "What each layer’s change is worth"
    table = _table(by_layer)
    text = f"Marks with intervals for {len(next(iter(task.values())))} layers."

    def drawn(slug: str, ax: Axes) -> tuple[Markup, Markup]:
        plots.worth(task, ax=ax)
        return svg.to_svg(ax, slug, title, text, layer_names), readout.of_layers(ax, table)

    parts = [f"{NAMES[metric]}: {profile.definition}" for metric, profile in task.items()]
    caption = (
        " ".join(f"{part[0].upper()}{part[1:]}" for part in parts)
        + " Whiskers are intervals over examples. Neither removes a layer: what is taken out or "
        "put in is what it learned."
    )
    sizes = ({"width": WIDE, "height": 3.3}, {"width": NARROW, "height": 2.9, "left": 0.7})
    return _twice(ReportFigure(slug, title, caption, None, table), drawn, sizes)


def _twice(figure: ReportFigure, drawn: Drawn, sizes: tuple[Size, Size]) -> ReportFigure:
    """Draw a figure for a wide screen and for a narrow one, on canvases of these sizes."""
    slugs = (figure.slug, f"{figure.slug}-narrow")
    pictures = []
    for slug, size in zip(slugs, sizes, strict=True):
        with svg.ink(slug):
            pictures.append(drawn(slug, canvas(**size)))
    (image, spoken), (narrow, narrow_spoken) = pictures
    return replace(figure, image=image, readout=spoken, narrow=narrow,
                   narrow_readout=narrow_spoken)  # fmt: skip


def _table(by_layer: Mapping[str, Any]) -> Table:
    """Every unit, also embedding, head and norm, with all that was measured of it."""
    frame: pd.DataFrame | None = None
    columns: list[Any] = [("layer", "layer"), ("name", "name")]
    for metric, profile in by_layer.items():
        rows = profile.to_frame()
        outside = profile.outside
        if outside is not None and outside["score"].notna().any():
            rows = pd.concat([rows, outside.dropna(axis=1, how="all")], ignore_index=True)
        named = {"score": metric, "low": f"{metric} low", "high": f"{metric} high"}
        part = rows[["name", *named]].rename(columns=named)
        frame = rows[["layer", "name"]].merge(part, on="name") if frame is None else frame.merge(
            part, on="name", how="outer", sort=False
        )  # fmt: skip
        label = NAMES[metric]
        columns += [(metric, label), (f"{metric} low", "low"), (f"{metric} high", "high")]
    if frame is None:
        frame = pd.DataFrame(columns=["layer", "name"])
    return frame_table("Worth of every unit, in nats per token", frame, columns, layer="layer")


def _trade_figure(slug: str, gain: Any, cost: Any, layer_names: Sequence[str]) -> ReportFigure:
    title = "Who gains, and who forgets"
    caption = (
        "Right: what a layer’s change is worth on the task. Up: what it costs on general text. A "
        "layer far up and not far right is one to put back (lisa-ablate --restore)."
    )
    frame = gain.to_frame()[["layer", "name", "score"]].rename(columns={"score": "gain"})
    frame = frame.assign(forgetting=cost.scores)
    table = frame_table(
        title, frame, [(c, c) for c in ("layer", "name", "gain", "forgetting")], layer="layer"
    )
    known = frame.dropna(subset=["gain", "forgetting"])
    said = [
        f"layer {r['layer']}: gain {number(r['gain'])}, forgetting {number(r['forgetting'])}"
        for r in known.to_dict("records")
    ]

    def drawn(slug: str, ax: Axes) -> tuple[Markup, Markup]:
        plots.gain_and_forgetting(gain, cost, ax=ax)
        image = svg.to_svg(ax, slug, title, "Scatter plot, one point per layer.", layer_names)
        at = readout.places(ax, list(known["gain"]), list(known["forgetting"]))
        return image, readout.points(at, said)

    sizes = (
        {"width": HALF, "height": 3.4, "top": 0.12},
        {"width": NARROW, "height": 3.1, "left": 0.7, "top": 0.12},
    )
    return _twice(ReportFigure(slug, title, caption, None, table, False), drawn, sizes)


def validity_figures(validity: Any) -> list[ReportFigure]:
    """Agreement of every metric with the ablation, by layer and at the finest level."""
    levels = list(dict.fromkeys(validity.to_frame()["level"]))
    shown = dict.fromkeys([levels[0], levels[-1]]) if levels[0] == "layer" else levels[-1:]
    return [_validity_figure(f"validity-{i}", validity, level) for i, level in enumerate(shown)]


def _validity_figure(wide: str, validity: Any, level: str) -> ReportFigure:
    frame = validity.to_frame()
    frame = frame[frame["level"] == level]
    rows = frame[["metric", "source"]].drop_duplicates()
    what = {"layer": "layers", "module": "modules", "within kind": "layers within each kind"}[level]
    title = f"Which metric predicts it, over {what}"

    def drawn(slug: str, ax: Axes) -> tuple[Markup, Markup]:
        plots.validity(validity, level=level, ax=ax)
        if slug != wide:
            ax.xaxis.set_major_locator(MultipleLocator(0.5))
            ax.set_xlabel("Spearman's ρ with the ablation")
            legend(ax, columns=1)
        image = svg.to_svg(ax, slug, title, f"Marks with intervals for {len(rows)} metrics.")
        names = [label.get_text() for label in ax.get_yticklabels()]
        at = readout.places(ax, [0] * len(names), ax.get_yticks())
        return image, readout.points(at, [_agreement_words(name, frame) for name in names])

    caption = (
        "Rank correlation with the ablation. Filled: better than chance among all metrics "
        "that were tried; open: not. Grey: where one metric alone lands by chance in 95 of 100 "
        "orders of the layers. Small bars: the most that the noise of both sides leaves."
    )
    table = _agreements(frame, title)
    high = 1.15 + 0.27 * max(len(rows), 2)
    sizes = (
        {"width": WIDE, "height": high, "left": 2.1},
        {"width": NARROW, "height": high + 0.3, "left": 1.25, "top": 0.72},
    )
    return _twice(ReportFigure(wide, title, caption, None, table), drawn, sizes)


def _agreement_words(name: str, frame: pd.DataFrame) -> str:
    """ρ of one metric with every way of asking."""
    called = [f"{m} · {s}" if s else m
              for m, s in zip(frame["metric"], frame["source"], strict=True)]  # fmt: skip
    rows = frame[[n == name for n in called]].to_dict("records")
    said = [f"{_TARGETS.get(r['target'], r['target'])} ρ {correlation(r['spearman'])} "
            f"({correlation(r['low'])} to {correlation(r['high'])})" for r in rows]  # fmt: skip
    return f"{name}: {', '.join(said)}"


def _agreements(frame: pd.DataFrame, title: str) -> Table:
    frame = frame.assign(target=[_TARGETS.get(target, target) for target in frame["target"]])
    frame["evidence"] = ["yes" if e else "no" for e in frame["evidence"]]
    if not (frame["source"] != "").any():
        frame = frame.drop(columns="source")
    return frame_table(
        title,
        frame,
        [
            ("level", "over"), ("target", "ablation"), ("metric", "metric"), ("source", "of"),
            ("spearman", "ρ", correlation), ("low", "low", correlation),
            ("high", "high", correlation), ("ceiling", "ceiling", correlation),
            ("chance", "chance", correlation), ("p", "p alone", number),
            ("p_of_all", "p among all", number), ("evidence", "evidence"), ("runs", "runs"),
        ],
    )  # fmt: skip
