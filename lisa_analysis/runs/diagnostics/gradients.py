"""Rules on gradients and loss: finite, consistent, clipped, balanced, steady."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.runs.diagnostics.rule import (
    CouldNotRunError,
    Evidence,
    Outcome,
    Rule,
    name_layers,
)
from lisa_analysis.statistics.effects import additive_effects
from lisa_analysis.statistics.persistence import MIN_ROWS

# Within one step a bad gradient comes before the update and the weights that it spoils.
_CAUSES = ("probe_grad_norm", "grad_norm", "grad_norm_l1", "grad_noise", "descent", "update_norm",
           "weight_norm", "delta_norm", "merged_norm", "opt_steps")  # fmt: skip


@dataclass(frozen=True)
class NormMismatch(Rule):
    """The recorder's total against the trainer's."""

    tolerance: float = 0.01
    id: ClassVar[str] = "norm_mismatch"
    title: ClassVar[str] = "Gradient norms that disagree"
    meaning: ClassVar[str] = (
        "The root of the summed squares of all tensors should be the trainer's own gradient norm: "
        "a difference means shards not reduced, a loss scale, or a tied weight counted twice."
    )
    advice: ClassVar[str] = (
        "Do not trust any gradient figure of this run; record on a single device in float32 and "
        "compare."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"median relative difference > {self.tolerance:.0%}"

    def check(self, evidence: Evidence) -> Outcome:
        """Compare totals on the steps that both recorded."""
        norms = evidence.column("grad_norm")
        scalars = evidence.scalar("grad_norm")
        logged = scalars.drop_duplicates("step", keep="last").set_index("step")["grad_norm"]
        square = np.where(np.isnan(norms), 0.0, norms.astype(np.float64)) ** 2
        total = np.sqrt(square.sum(axis=1))
        theirs = logged.reindex(evidence.table.steps).to_numpy(dtype=np.float64)
        # A step at which no gradient was recorded at all has no total.
        usable = np.isfinite(total) & np.isfinite(theirs) & (theirs > 0)
        usable &= ~np.isnan(norms).all(axis=1)
        if not usable.any():
            raise CouldNotRunError("no step has both gradient norms")
        off = np.abs(total[usable] / theirs[usable] - 1)
        typical = float(np.median(off))
        if typical <= self.tolerance:
            return Outcome("ok", f"Recorded and logged totals agree to {typical:.1e}.")
        first = int(evidence.table.steps[usable][np.argmax(off > self.tolerance)])
        return Outcome(
            "fail",
            f"The recorded total differs from the trainer's by {typical:.1%} (median of "
            f"{int(usable.sum())} steps).",
            step=first,
        )


@dataclass(frozen=True)
class NonFinite(Rule):
    """NaN or infinity anywhere."""

    id: ClassVar[str] = "non_finite"
    title: ClassVar[str] = "Non-finite values"
    meaning: ClassVar[str] = (
        "Once a weight or its optimizer state is NaN, training cannot recover; an infinite "
        "gradient is skipped only under a loss scaler."
    )
    advice: ClassVar[str] = (
        "Look at the batch and the layer named here first; lower the learning rate, clip, or "
        "leave float16."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return "any NaN or infinity in norms or loss"

    def check(self, evidence: Evidence) -> Outcome:
        """Name the first of them."""
        table = evidence.table
        if not table.rows and not len(evidence.scalars):
            raise CouldNotRunError("nothing was recorded")
        found = [(step, column, param) for column, (step, param) in table.first_non_finite.items()]
        scalars = evidence.scalars
        loss = _bad_losses(scalars)
        if not found and not loss:
            return Outcome("ok", f"All {table.rows:,} recorded rows are finite.")
        parts: list[str] = []
        layers: tuple[int, ...] = ()
        if found:
            step, column, param = min(found, key=lambda f: (f[0], _CAUSES.index(f[1])))
            row = evidence.run.parameters.set_index("param_id").loc[param]
            where: str = "" if pd.isna(row["layer"]) else f" of layer {int(row['layer'])}"
            layers = () if pd.isna(row["layer"]) else (int(row["layer"]),)
            parts.append(f"First {column} at step {step}: {row['name']}{where}.")
            others = sorted({c for _, c, _ in found} - {column})
            if others:
                parts.append(f"Later also {', '.join(others)}.")
        if loss:
            parts.append(f"The loss is not finite at {len(loss)} steps, first {loss[0]}.")
        first = min([s for s, _, _ in found] + loss[:1])
        return Outcome("fail", " ".join(parts), layers, first)


@dataclass(frozen=True)
class DeadLayers(Rule):
    """Layers that train and never get a gradient."""

    steps: int = 3
    id: ClassVar[str] = "dead_layers"
    title: ClassVar[str] = "Layers without a gradient"
    meaning: ClassVar[str] = (
        "A layer that is to train has a gradient of exactly zero at every recorded step: nothing "
        "of the loss reaches it, and only weight decay moves it."
    )
    advice: ClassVar[str] = (
        "Look for a detach, a no_grad block or a branch that the loss does not use; of a routed "
        "layer, for tokens that never get there."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"gradient = 0 at every recorded step of a layer, {self.steps} of them at least"

    def check(self, evidence: Evidence) -> Outcome:
        """Count the recorded steps of every layer, and those with a gradient."""
        norms = evidence.layers("grad_norm")
        measured = (~np.isnan(norms)).sum(axis=0)
        zero = (norms == 0).sum(axis=0)
        dead = np.flatnonzero((measured >= self.steps) & (zero == measured))
        if not (measured >= self.steps).any():
            raise CouldNotRunError(f"no layer was recorded at {self.steps} steps")
        if not len(dead):
            return Outcome("ok", "Every layer that trained had a gradient.")
        layers = tuple(dead.tolist())
        return Outcome(
            "fail", f"{name_layers(layers)}: the gradient is 0 at every recorded step.", layers
        )


@dataclass(frozen=True)
class ClipPressure(Rule):
    """Clipping that rules the step size."""

    share: float = 0.5
    coefficient: float = 0.1
    id: ClassVar[str] = "clip_pressure"
    title: ClassVar[str] = "Clipping decides the step"
    meaning: ClassVar[str] = (
        "When most steps are clipped, max_grad_norm acts as a learning-rate schedule that nobody "
        "chose, and layers with large gradients take the room of the others."
    )
    advice: ClassVar[str] = "Raise max_grad_norm, lower the learning rate, or warm up longer."

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"> {self.share:.0%} of steps clipped, or a median factor < {self.coefficient:g}"

    def check(self, evidence: Evidence) -> Outcome:
        """Count clipped steps."""
        factor = evidence.scalar("clip_coef")["clip_coef"].to_numpy(dtype=np.float64)
        # A factor just below 1 is the 1e-6 in PyTorch's denominator.
        clipped = float((factor < 1 - 1e-4).mean())
        middle = float(np.median(factor))
        fires = clipped > self.share or middle < self.coefficient
        text = f"{clipped:.0%} of {len(factor)} steps clipped; median factor {middle:.2g}."
        return Outcome("warn" if fires else "ok", text)


@dataclass(frozen=True)
class DepthImbalance(Rule):
    """Gradients that vanish or explode with depth."""

    ratio: float = 100.0
    id: ClassVar[str] = "depth_imbalance"
    title: ClassVar[str] = "Gradients unequal over depth"
    meaning: ClassVar[str] = (
        "Layers whose gradients differ by orders of magnitude share one clipping threshold and, "
        "without Adam, one learning rate."
    )
    advice: ClassVar[str] = "Expect little from the small ones under SGD; under Adam this is mild."

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return f"largest / smallest layer gradient > {self.ratio:g}"

    def check(self, evidence: Evidence) -> Outcome:
        """Compare geometric means over time, of layers as they stand beside each other at a step.

        Gradients fall while training goes on: of LISA a layer that was drawn early would be large.
        """
        norms = evidence.layers("grad_norm")
        usable = np.isfinite(norms) & (norms > 0)
        seen = usable.any(axis=0)
        if seen.sum() < 2:
            raise CouldNotRunError("fewer than two layers have gradients")
        effects = additive_effects(np.log(np.where(usable, norms, np.nan)))
        if effects.adjusted != "steps" and usable.any(axis=1).sum() < MIN_ROWS:
            raise CouldNotRunError(
                f"layers were recorded at other steps than one another, {MIN_ROWS} records needed"
            )
        mean = effects.layer[seen]
        ratio = float(np.exp(mean.max() - mean.min()))
        layers = np.flatnonzero(seen)
        ends = (int(layers[mean.argmax()]), int(layers[mean.argmin()]))
        text = f"Layer {ends[0]} has {ratio:.3g} times the gradient of layer {ends[1]}."
        return Outcome("info" if ratio > self.ratio else "ok", text, ends)


@dataclass(frozen=True)
class LossSpikes(Rule):
    """Sudden rises of the loss, and the layer that moved first."""

    deviations: float = 8.0
    window: int = 25
    id: ClassVar[str] = "loss_spikes"
    title: ClassVar[str] = "Loss spikes"
    meaning: ClassVar[str] = (
        "The loss jumped far above its recent level; the layer whose gradient left its usual "
        "range first is the place to look."
    )
    advice: ClassVar[str] = (
        "Look at the batches before the spike; clip, lower the learning rate, or lower Adam's β₂."
    )

    @property
    def threshold(self) -> str:
        """When the rule fires."""
        return (
            f"loss more than {self.deviations:g} robust deviations above the median of the "
            f"{self.window} steps before"
        )

    def check(self, evidence: Evidence) -> Outcome:
        """Find the first spike, and the layer that moved before it."""
        frame = evidence.scalar("loss")
        loss = frame["loss"].to_numpy(dtype=np.float64)
        steps = frame["step"].to_numpy(dtype=np.int64)
        finite = np.isfinite(loss)
        loss, steps = loss[finite], steps[finite]
        if len(loss) < self.window + 5:
            raise CouldNotRunError(f"fewer than {self.window + 5} losses were logged")
        excess = self._excess(loss)
        spikes = np.flatnonzero(excess > self.deviations)
        if not len(spikes):
            return Outcome("ok", f"No spike in {len(loss)} logged losses.")
        first, worst = int(spikes[0]), int(np.argmax(excess))
        usual = float(np.median(loss[max(0, first - self.window) : first]))
        text = (
            f"{len(spikes)} logged losses stand out, first {loss[first]:.3g} at step "
            f"{steps[first]} (before it {usual:.3g}); the largest is {loss[worst]:.3g} at step "
            f"{steps[worst]}."
        )
        moved = self._first_layer(evidence, int(steps[first]))
        if moved is None:
            text += " No layer's gradient moved first."
            return Outcome("warn", text, step=int(steps[first]))
        layer, step, factor = moved
        return Outcome(
            "warn",
            f"{text} Layer {layer} moved first, at step {step}: {factor:.1f} times its usual "
            "gradient.",
            (layer,),
            int(steps[first]),
        )

    def _excess(self, loss: NDArray[np.float64]) -> NDArray[np.float64]:
        """Robust deviations of every loss above the median of the window before it."""
        windows = np.lib.stride_tricks.sliding_window_view(loss, self.window)[:-1]
        middle = np.median(windows, axis=1)
        spread = 1.4826 * np.median(np.abs(windows - middle[:, None]), axis=1)
        overall = 1.4826 * float(np.median(np.abs(np.diff(loss)))) / np.sqrt(2)
        scale = np.maximum(np.maximum(spread, overall), 1e-3 * np.abs(middle) + 1e-12)
        excess = np.zeros(len(loss))
        excess[self.window :] = (loss[self.window :] - middle) / scale
        return excess

    def _first_layer(self, evidence: Evidence, spike: int) -> tuple[int, int, float] | None:
        """Layer that first left its usual range in the recorded steps up to the spike."""
        try:
            norms = evidence.layers("grad_norm")
        except CouldNotRunError:
            return None
        steps = evidence.table.steps
        last = int(np.searchsorted(steps, spike, side="right"))
        start = max(0, last - self.window)
        usual = np.log(np.where(norms[:last] > 0, norms[:last], np.nan).astype(np.float64))
        usual[~np.isfinite(usual)] = np.nan
        reference = usual[max(0, start - 4 * self.window) : max(start, last // 2, 1)]
        if np.isfinite(reference).sum(axis=0).max(initial=0) < 5:
            return None
        known = np.isfinite(reference).sum(axis=0) >= 5
        reference = np.where(known, reference, 0.0)
        middle = np.nanmedian(reference, axis=0)
        spread = 1.4826 * np.nanmedian(np.abs(reference - middle), axis=0) + 0.05
        departed = (usual[start:last] - middle) / spread > 6
        departed &= known
        if not departed.any():
            return None
        row = int(np.argmax(departed.any(axis=1)))
        deviation = np.where(departed[row], (usual[start + row] - middle) / spread, -np.inf)
        layer = int(np.argmax(deviation))
        factor = float(np.exp(usual[start + row, layer] - middle[layer]))
        return layer, int(steps[start + row]), factor


def _bad_losses(scalars: pd.DataFrame) -> list[int]:
    """Steps whose loss is not finite, skipped steps left out.

    The frame shows "not logged" and NaN alike; a NaN counts when every line before it had a loss.
    """
    if "loss" not in scalars or not len(scalars):
        return []
    loss = scalars["loss"].to_numpy(dtype=np.float64)
    missing = np.isnan(loss)
    regular = bool(missing.any()) and int(np.argmax(missing)) >= 5
    bad = np.isinf(loss) | (missing & regular)
    if "skipped" in scalars:
        bad &= ~scalars["skipped"].eq(True).to_numpy(dtype=bool)
    return [int(step) for step in scalars["step"][bad]]
