"""The same model under every method, side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_train.estimate.cards import Card
from lisa_train.estimate.result import CONTEXT_BYTES, FRAGMENTATION, PARTS, MemoryEstimate
from lisa_train.estimate.setting import Setting
from lisa_train.methods import METHODS
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.select.config import SelectConfig

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PretrainedConfig

CONFIGURED = "as configured"


@dataclass(frozen=True)
class MethodTable:
    """Estimates by the name of their method, in the order of the table."""

    rows: dict[str, MemoryEstimate]
    cards: tuple[Card, ...] = ()

    def to_frame(self) -> "pd.DataFrame":
        """One row per method: GB (10⁹ bytes) of the fullest device, and which cards fit."""
        import pandas as pd

        rows = []
        for name, estimate in self.rows.items():
            device = estimate.fullest
            row: dict[str, object] = {"method": name}
            row |= {part: getattr(device, part) / 1e9 for part in PARTS}
            row |= {"total": estimate.total / 1e9, "needs": estimate.needs() / 1e9}
            row |= {card.name: estimate.fits(card.bytes) for card in self.cards}
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        first = next(iter(self.rows.values()))
        numbers = [*PARTS, "total", "needs"]
        lines = [["method", *numbers, *(card.name for card in self.cards)]]
        for name, estimate in self.rows.items():
            device = estimate.fullest
            values = [getattr(device, part) for part in PARTS]
            values += [estimate.total, estimate.needs()]
            fits = [_verdict(estimate, card) for card in self.cards]
            lines.append([name, *(f"{value / 1e9:.2f}" for value in values), *fits])
        return "\n".join([_headline(first), "", *_aligned(lines), "", _legend(self.rows)])

    def _repr_html_(self) -> str:
        return str(self.to_frame().round(2).to_html(index=False, border=0))


def _verdict(estimate: MemoryEstimate, card: Card) -> str:
    if not estimate.fits(card.bytes):
        return "no"
    return "fits" if estimate.fits_unpaged(card.bytes) else "paged"


def _headline(estimate: MemoryEstimate) -> str:
    setting = estimate.setting
    several = ""
    if setting.devices > 1:
        several = f", {setting.devices} devices ({setting.spread})"
    compute = f" under {setting.autocast} autocast" if setting.autocast else ""
    options = [
        name.replace("_", " ")
        for name in ("gradient_checkpointing", "chunked_loss", "step_in_backward")
        if getattr(setting, name)
    ]
    return (
        f"{estimate.model}, {estimate.parameters / 1e9:.3g} B parameters: batch "
        f"{setting.batch_size} × {setting.sequence_length} tokens, weights {setting.dtype}"
        f"{compute}, {setting.attn_implementation} attention, {setting.optim}"
        + "".join(f", {option}" for option in options)
        + several
    )


def _legend(rows: dict[str, MemoryEstimate]) -> str:
    lines = [
        "GB of 10⁹ bytes on the fullest device. The parts are each at their largest; total is the",
        "most that is allocated at once. needs = total + "
        f"{CONTEXT_BYTES / 1e9:g} GB for the CUDA context and workspaces + {FRAGMENTATION:.0%} of",
        "gradients and activations for fragmentation (assumed, not measured).",
    ]
    if any("E+H" in name for name in rows):
        lines.append("LISA: E+H embedding and head (and norm), always; 2L two layers at a time.")
    drawn = {name: e for name, e in rows.items() if e.mean != e.total}
    if drawn:
        means = ", ".join(f"{name} {e.mean / 1e9:.2f}" for name, e in drawn.items())
        lines.append(f"LISA: the layers that cost the most. Total in the mean over draws: {means}.")
    if host := {name: e.host for name, e in rows.items() if e.host}:
        states = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in host.items())
        lines.append(f"Optimizer state in host memory besides: {states}.")
    if any(e.paged for e in rows.values()):
        lines.append(
            "Paged state counts there, except for the tensor that steps. It is managed memory: on "
            "the device\nwhile there is room, moved out and in by the driver. paged = fits only "
            "if it moves; never measured\non a GPU."
        )
    return "\n".join(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [f"{line[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def methods(base: Setting, layers: int, stacks: int = 1) -> dict[str, Setting]:
    """Return the methods of the table, with everything else as in `base`.

    Rows of LISA that need more layers than the model has, or fewer than one of each of its stacks,
    are left out.
    """
    plain = replace(
        base,
        method="full",
        lisa=LisaConfig(layers=base.lisa.layers, stacks=base.lisa.stacks),
        lora={},
        peft={},
        select=SelectConfig(),
        active_layers=None,
    )
    rows = {
        "full": plain,
        "LoRA r=16": replace(plain, method="lora", lora={"r": 16}),
        "LoRA r=128": replace(plain, method="lora", lora={"r": 128}),
        "LISA E+H": replace(plain, method="lisa", active_layers=()),
    }
    least = stacks if base.lisa.stacks == "apart" else 1
    for k in (2, 4):
        if least <= k <= layers:
            lisa = replace(plain.lisa, activated_layers=k)
            rows[f"LISA E+H+{k}L"] = replace(plain, method="lisa", lisa=lisa)
    if least <= 2 <= layers:
        lisa = replace(plain.lisa, activated_layers=2, always_active=())
        rows["LISA 2L, no E, H, norm"] = replace(plain, method="lisa", lisa=lisa)
    return rows


def method_table(
    source: "nn.Module | PretrainedConfig | str | Path",
    base: Setting,
    cards: tuple[Card, ...] = (),
) -> MethodTable:
    """Estimate `base` and the usual methods beside it.

    Parameters
    ----------
    source
        As in `estimate_memory`.
    base
        The row ``as configured``; the other rows differ from it in the method alone.
    cards
        Cards to compare with.
    """
    from lisa_train.estimate.memory import estimate
    from lisa_train.estimate.stage import Stage

    shared = Stage(source, replace(base, method="full", active_layers=None))
    found = shared.layer_map
    rows = {CONFIGURED: base, **methods(base, len(found), len(set(found.stacks)))}
    return MethodTable(
        {
            name: estimate(source if METHODS[setting.method].changes_model else shared, setting)
            for name, setting in rows.items()
        },
        cards,
    )
