"""`RecordConfig`: what a run writes into its run directory, and how often."""

import re
from dataclasses import dataclass
from typing import Literal

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.checks import one_of, real, whole
from lisa_train.measure.quantities import REGISTRY

# The built-in quantities, and those of them that only a tensor that trains in the step has.
QUANTITIES = REGISTRY.choosable()
OF_TRAINING = tuple(name for name in QUANTITIES if REGISTRY[name].column.of_training)


@dataclass(frozen=True)
class RecordConfig:
    """What a run writes into its run directory, and how often.

    Parameters
    ----------
    run_dir
        The run directory. `lisa-train` fills in its `output_dir`.
    every
        Record the norms of every n-th optimizer step (and of the first).
    quantities
        Columns of the metrics table to measure at those steps. `update_norm` and `descent` keep
        a copy of the weights that train during such a step; `delta_norm` and `merged_norm` are
        those of LoRA adapters, of which a copy is kept where they do not begin with BA = 0
        (PiSSA), and `merged_norm`, which takes the base weights, is measured in censuses alone
        (start, checkpoints, end). Norms of weights alone get `opt_steps` with them: a census has
        these norms too, of frozen tensors as well, and the analysis must tell the two apart.
        Quantities of one's own are registered, see `lisa_train.Quantity`.
    select
        Measure only these tensors: layer indices (``3``), kinds (``attn.q``), or regular
        expressions that are searched in the tensor's name. None measures all.
    layers
        Path of the list that holds the layers, where the model's structure leaves it open
        (with LISA: `LisaConfig.layers`).
    base_delta
        Measure ‖W − W₀‖ of every tensor of the model in each census (start, checkpoints, end);
        W₀ is read again from the base checkpoint, tensor by tensor. Of a frozen weight below an
        adapter this is what the adapter's initialisation took out of it (PiSSA, LoftQ).
    grad_noise
        Measure the variance of the gradient between the micro-batches of accumulation, each of
        which makes one backward pass.
    probe_every
        Every so many steps one extra backward pass measures the gradient of all layers, also of
        those that are frozen; 0 never does.
    probe_batches
        How many batches, of each process, are probed at those steps. With more than one they are
        drawn from the training data, independent of those that train and the same at every
        probe, and give signal and noise in `probes/`; the start and the end of training are
        probed as well. Nothing about the training changes.
    report_layers
        Show trackers (`report_to`) the gradient and update norm of every layer and whether it
        trained (`trained/layer_07`), in the place of those of thirds of the stack, once for each
        step that has been written: a tracker sees them up to `flush_seconds` later, beside the
        `recorded_step` that they are of.
    watch
        Look at what was measured whenever it is written, by the rules of `la.diagnose`: values
        that are not finite, layers that do not move, updates lost to half precision, adapters
        that do nothing, a layer that is never drawn. A finding is one line in the log, a
        `warning` among the run's events, and an alert of the tracker, once. Between two flushes
        nothing is done.
    flush_seconds
        Longest time that measured values stay in memory only.
    on_record_error
        ``warn``: when recording fails, say so and train on; where lisa-toolkit itself is at
        fault (a bug), with the traceback and a request to report it, and the run's recording
        ends as ``failed``. ``raise``: stop training. With ``LISA_TOOLKIT_STRICT=1`` in the
        environment faults of lisa-toolkit stop training in either case, as in its own tests. A
        directory that holds a run already is refused before training in either case, and so is
        one that another process writes if the checkpoints are to go there too.
    """

    run_dir: str | None = None
    every: int = 10
    quantities: tuple[str, ...] = QUANTITIES
    select: tuple[str | int, ...] | None = None
    layers: str | None = None
    base_delta: bool = False
    grad_noise: bool = False
    probe_every: int = 0
    probe_batches: int = 1
    report_layers: bool = False
    watch: bool = True
    flush_seconds: float = 30.0
    on_record_error: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        for name, least, words in (
            ("every", 1, " of at least 1"),
            ("probe_every", 0, ": 0 (never), or every how many steps"),
            ("probe_batches", 1, " of at least 1"),
        ):
            value = whole(f"record.{name}", getattr(self, name), words, least)
            object.__setattr__(self, name, value)
        if isinstance(self.quantities, str):
            raise ConfigError(
                f"record.quantities is the text {self.quantities!r}: give a list of names."
            )
        object.__setattr__(self, "quantities", tuple(self.quantities))
        known = REGISTRY.choosable()
        for name in self.quantities:
            if name not in known:
                raise ConfigError(
                    f"record.quantities names {name!r}: there are {', '.join(known)}."
                    f"{suggest(str(name), known)}"
                )
        trains = any(REGISTRY[name].column.of_training for name in self.quantities)
        if self.quantities and not trains:
            object.__setattr__(self, "quantities", (*self.quantities, "opt_steps"))
        if self.probe_batches > 1 and not self.probe_every:
            raise ConfigError(
                f"record.probe_batches is {self.probe_batches} and record.probe_every 0: say every "
                "how many steps they are to be probed."
            )
        words = "a number of seconds, 0 (every recorded step) or more"
        if not real("record.flush_seconds", self.flush_seconds, words) >= 0:
            raise ConfigError(f"record.flush_seconds is {self.flush_seconds}, but must be {words}.")
        one_of("record.on_record_error", self.on_record_error, ("warn", "raise"))
        self._check_select()

    def check_micro_batches(self, *, gradient_accumulation_steps: int, processes: int) -> None:
        """`ConfigError` where a step has one micro-batch, which shows no noise.

        Parameters
        ----------
        gradient_accumulation_steps, processes
            Micro-batches of a step in each process, and the processes that train.
        """
        if self.grad_noise and gradient_accumulation_steps < 2 and processes < 2:
            raise ConfigError(
                "record.grad_noise is true, but a step has one micro-batch, and nothing to compare "
                "it with; set gradient_accumulation_steps to 2 or more, or remove "
                "record.grad_noise."
            )

    def _check_select(self) -> None:
        if self.select is None:
            return
        entries = (self.select,) if isinstance(self.select, str | int) else tuple(self.select)
        object.__setattr__(self, "select", entries)
        if not entries:
            raise ConfigError("record.select is empty: leave it out to measure every tensor.")
        for entry in entries:
            try:
                if not isinstance(entry, int):
                    re.compile(entry)
            except (re.error, TypeError):
                raise ConfigError(
                    f"record.select holds {entry!r}: give layer indices, kinds as 'attn.q', or "
                    "regular expressions."
                ) from None
