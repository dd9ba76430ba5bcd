"""The progress of a run as HTML for a notebook: bar, loss, time left, and the loss curve."""

import html
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[int, float]]

# Okabe and Ito's blue and vermilion: told apart by everyone, on light and on dark pages.
_TRAINING, _HELD_OUT = "#0072b2", "#d55e00"
_WIDTH, _HEIGHT, _LEFT, _MARGIN = 480, 110, 40, 12


def progress_page(
    step: int,
    total: int,
    shown: Mapping[str, str],
    training: Points,
    held_out: Points,
    time: str,
) -> str:
    """Return a bar with a line of text, and the loss curve as SVG.

    Parameters
    ----------
    step, total
        Completed and all optimizer steps.
    shown
        Further facts by name, as ``{"loss": "2.310"}``.
    training, held_out
        (step, loss) in increasing order; non-finite losses must have been left out.
    time
        Time left, or time taken, in words.
    """
    facts = [f"step {step}/{total}", *(f"{name} {text}" for name, text in shown.items())]
    if held_out:
        facts.append(f"held-out loss {held_out[-1][1]:.3f}")
    line = html.escape(" · ".join([*facts, time]))
    return (
        f'<div><progress value="{step}" max="{max(total, 1)}" style="width:{_WIDTH}px" '
        f'aria-label="training progress"></progress><br><span>{line}</span>'
        f"{loss_svg(training, held_out, total)}</div>"
    )


def loss_svg(training: Points, held_out: Points, total: int) -> str:
    """Return the training losses as a line and the held-out losses as diamonds; '' for none."""
    losses = [loss for _, loss in (*training, *held_out)]
    if not losses:
        return ""
    low, high = min(losses), max(losses)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _MARGIN) * point[0] / max(total, 1)
        up = (_HEIGHT - 2 * _MARGIN) * (point[1] - low) / ((high - low) or 1.0)
        return _LEFT + across, _HEIGHT - _MARGIN - up

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, training))
    marks = "".join(
        f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{_HELD_OUT}"/>'
        for x, y in map(place, held_out)
    )
    ticks = "".join(
        f'<text x="{_LEFT - 6}" y="{y:.0f}" text-anchor="end" font-size="11" '
        f'fill="currentColor">{value:.2f}</text>'
        for value, y in ((high, _MARGIN + 4), (low, _HEIGHT - _MARGIN + 4))[
            : 2 if high > low else 1
        ]
    )
    key = f'<tspan fill="{_TRAINING}">— training loss</tspan>'
    if held_out:
        key += f' <tspan fill="{_HELD_OUT}">◆ held-out loss</tspan>'
    return (
        f'<br><svg width="{_WIDTH}" height="{_HEIGHT + 16}" role="img" '
        f'aria-label="loss over the steps">{ticks}'
        f'<polyline points="{line}" fill="none" stroke="{_TRAINING}" stroke-width="1.5"/>{marks}'
        f'<text x="{_LEFT}" y="{_HEIGHT + 12}" font-size="11">{key}</text></svg>'
    )
