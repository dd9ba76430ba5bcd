"""Matplotlib figure -> inline SVG that follows the page's colours and cannot clash with others."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG

from lisa_analysis.views.html_report.format import clean
from lisa_analysis.views.plots import style

# A colour that no plot uses: the page's own text colour takes its place.
_INK = "#010203"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")

# Colours with a second value for the dark theme, see report.css.
_THEME = {
    **{color.lower(): f"var(--series-{i})" for i, color in enumerate(style.SERIES)},
    style.MUTED: "var(--muted-mark)",
    style.GRID: "var(--grid)",
    style.FROZEN: "var(--frozen)",
    style.NON_FINITE: "var(--non-finite)",
}


@contextmanager
def ink(slug: str) -> Iterator[None]:
    """Settings under which a figure must be drawn *and* converted: text stays text, ids are fixed.

    `slug` seeds matplotlib's ids, so that the same figure gives the same bytes.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": slug,
        "image.composite_image": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "font.size": 9.0,
        "hatch.linewidth": 0.7,
        "path.simplify_threshold": 0.3,
        **dict.fromkeys(_INKED, _INK),
    }
    with mpl.rc_context(settings):
        yield


def mark_layers(ax: Axes, n_layers: int, *, upright: bool = False) -> None:
    """Lay an invisible stripe over every layer, for highlighting.

    Layers are rows of the picture, or columns where it is `upright`.
    """
    for layer in range(n_layers):
        stripe = (ax.axvspan if upright else ax.axhspan)(
            layer - 0.5, layer + 0.5, facecolor="none", edgecolor="none"
        )
        stripe.set_gid(f"layer-{layer}")


def to_svg(
    ax: Axes, slug: str, title: str, description: str, layer_names: Sequence[str] = ()
) -> Markup:
    """Convert the figure of `ax` for embedding in a page.

    Parameters
    ----------
    ax
        Axes of a figure drawn under `ink`.
    slug
        Unique in the page; every id in the SVG starts with it.
    title, description
        What a screen reader says; plain text, escaped here.
    layer_names
        Names shown when the pointer rests on an element marked as a layer.

    Returns
    -------
    Markup
        One ``<svg>`` element. Safe: the only text that comes from outside is escaped by
        matplotlib's XML writer or here.
    """
    buffer = io.StringIO()
    # `savefig` would lay out and draw everything twice.
    FigureCanvasSVG(ax.get_figure(root=True)).print_svg(
        buffer, metadata={"Date": None, "Creator": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ?([\d.]+)px [^;\"]*", r"font-size:\1px", text)
    text = re.sub(r'(?<= )(d|x|y)="[^"]*"', _rounded, text)
    text = _mark(text, layer_names)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{slug}-\1"', text)
    for color, replacement in {_INK: "currentColor", **_THEME}.items():
        text = text.replace(color, replacement)
    return Markup(_with_head(text, slug, title, description))


def _rounded(match: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", match[0])


def _mark(text: str, layer_names: Sequence[str]) -> str:
    """Turn ``id="layer-3"`` into a class, a data attribute and a tooltip."""

    def replace(match: re.Match[str]) -> str:
        layer = int(match[1])
        name = f" · {clean(layer_names[layer])}" if layer < len(layer_names) else ""
        return f'<g class="layer" data-layer="{layer}"><title>layer {layer}{escape(name)}</title>'

    return re.sub(r'<g id="layer-(\d+)">', replace, text)


def _with_head(text: str, slug: str, title: str, description: str) -> str:
    """Replace the root's size by its view box and give it a role, a title and a description."""
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    view = box[1] if box else "0 0 720 300"
    # The page shows a point as 1.4 px: figures of any width have letters of one size.
    width = 1.4 * float(view.split()[2])
    return (
        f'<svg viewBox="{view}" style="max-width:{width:.0f}px" role="img" '
        f'aria-labelledby="{slug}-title {slug}-desc" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{slug}-title">{escape(clean(title))}</title>'
        f'<desc id="{slug}-desc">{escape(description)}</desc>{body.rstrip()}'
    )
