"""What a Trainer's trackers are told beside its own log: alerts."""

import sys
from typing import TYPE_CHECKING, Any

from transformers import Trainer

if TYPE_CHECKING:
    from lisa_analysis.runs.diagnostics.finding import Finding


def alert(trainer: Trainer, step: int, finding: "Finding") -> None:
    """Raise an alert for a finding in every tracker of a trainer that has such a thing.

    trackio and wandb have alerts; TensorBoard gets a text of the name ``findings``. Other trackers
    get nothing: the log and the run directory have the sentence.

    Parameters
    ----------
    trainer
        The trainer, of the process that reports.
    step
        Optimizer steps done.
    finding
        What was found.
    """
    callbacks = {type(one).__name__: one for one in trainer.callback_handler.callbacks}
    title = f"{finding.title} (step {step})"
    text = f"{finding.evidence} Try: {finding.advice}"
    writer = getattr(callbacks.get("TensorBoardCallback"), "tb_writer", None)
    if writer is not None:
        writer.add_text("findings", f"{title}: {text}", step)
    wandb: Any = sys.modules.get("wandb")
    if "WandbCallback" in callbacks and getattr(wandb, "run", None) is not None:
        wandb.alert(title=title, text=text, level=_level(wandb, finding))
    trackio: Any = sys.modules.get("trackio")
    if "TrackioCallback" in callbacks and hasattr(trackio, "alert"):
        trackio.alert(title=title, text=text, level=_level(trackio, finding))


def _level(tracker: Any, finding: "Finding") -> Any:
    return tracker.AlertLevel.ERROR if finding.state == "fail" else tracker.AlertLevel.WARN
