"""The run directory of a Trainer: what it is opened with, continued from, and refused for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.schema import MANIFEST
from lisa_analysis.rundir.events import evaluations
from lisa_analysis.rundir.opening import load
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.disk.manifest import describe_run
from lisa_train.measure.disk.run_file import one_sentence
from lisa_train.measure.disk.storage import HeldError
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.recorder import NormRecorder
from lisa_train.measure.session import RunSession
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.run_entries import joined, lisa_entries
from lisa_train.model.tensor_table import TensorTable
from lisa_train.trainer.continuation import Continuation
from lisa_train.trainer.losses import added_means
from lisa_train.trainer.tally import Evaluation

NO_BATCH = (
    "the training data give no batch; give at least as many examples as a batch has, or set "
    "dataloader_drop_last to false."
)


class TrainerRun:
    """Knows what a trainer's run directory says of it.

    Parameters
    ----------
    trainer
        The trainer.
    config
        What to record, and where.
    manifest
        Entries for run.json that the trainer does not know.
    config_yaml
        Content of config.yaml.
    resume
        Continue the run in the directory; also done when training resumes from a checkpoint.
    continuation
        What knows how a resumed training differs from the one that was interrupted.

    Attributes
    ----------
    tokens
        Tokens up to here, as far as the earlier segments of the run counted them.
    held_out
        Evaluations of the earlier segments: step and numbers.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: RecordConfig,
        *,
        manifest: Mapping[str, Any] | None,
        config_yaml: str | None,
        resume: bool,
        continuation: Continuation | None,
    ) -> None:
        if config.run_dir is None:
            raise ConfigError("record.run_dir is not set: name the folder to write.")
        self.tokens = 0
        self.held_out: list[Evaluation] = []
        self._trainer = trainer
        self._config = config
        self._run_dir = Path(config.run_dir)
        self._manifest = dict(manifest or {})
        self._config_yaml = config_yaml
        self._resume = resume
        self._continuation = continuation

    def begin(
        self,
        session: RunSession,
        earlier: NormRecorder | None,
        step: int,
        layer_map: LayerMap,
        table: TensorTable,
        lisa: LisaConfig | None,
    ) -> bool:
        """Open the run, or go on with that of an `earlier` attempt; False if nothing is recorded.

        A directory that holds a run is refused whatever `on_record_error` says: nothing has begun
        yet, and the run that the user wants may be the one to continue.
        """

        def open_run() -> RunWriter | SilentWriter:
            if earlier is None:
                return self._open(step, layer_map, table, lisa)
            earlier.writer.begin_segment(step, parts=self._parts())
            return earlier.writer

        def give_up(problem: Exception | None) -> None:
            if earlier is not None:
                earlier.close("failed", one_sentence(problem) if problem else None)

        return session.open(open_run, also_refused=self._among_others, unless=give_up)

    def _open(
        self, step: int, layer_map: LayerMap, table: TensorTable, lisa: LisaConfig | None
    ) -> RunWriter:
        self.tokens, self.held_out = 0, []
        resume = self._resume or (step > 0 and (self._run_dir / MANIFEST).exists())
        writer = RunWriter(
            self._run_dir,
            manifest=self._entries(table, layer_map, lisa),
            parameters=table.rows,
            config_yaml=self._config_yaml,
            resume=resume,
            step=step,
            checkpoint=self.checkpoint_path(step) if step else None,
            parts=self._parts(),
            resumed=self._resumed(),
        )
        if resume:
            self._continue(step)
        return writer

    def _parts(self) -> dict[str, Any]:
        """How a step of the segment that begins is put together."""
        return self._continuation.parts(self._trainer.args) if self._continuation else {}

    def notes(self) -> list[str]:
        """Warnings about how training goes on."""
        found = list(self._continuation.notes) if self._continuation else []
        parts = self._trainer.eval_dataset
        if isinstance(parts, dict):
            losses = " and ".join(f"eval_{name}_loss" for name in parts)
            found.append(
                f"eval_dataset has parts, whose losses stand in the events as {losses}: this run "
                "has no held-out loss to be compared by; give one dataset to have it."
            )
        means = added_means(self._trainer)
        return [*found, means] if means else found

    def checkpoint_path(self, step: int) -> str:
        """Path of a checkpoint as the run directory sees it."""
        path = os.path.join(self._trainer.args.output_dir or ".", f"checkpoint-{step}")
        return Path(os.path.relpath(path, self._run_dir)).as_posix()

    def _among_others(self, problem: Exception) -> bool:
        """Whether checkpoints would go into the directory that another process fills."""
        output = Path(self._trainer.args.output_dir or ".").resolve()
        return isinstance(problem, HeldError) and output.is_relative_to(self._run_dir.resolve())

    def _resumed(self) -> dict[str, Any]:
        """Fields of the event `resume`: what goes on, and what is not as it was."""
        found: dict[str, Any] = {"processes": self._trainer.args.world_size}
        if self._continuation is not None:
            found["changes"] = self._continuation.changes or None
            found["missing"] = self._continuation.missing or None
        return found

    def _entries(
        self, table: TensorTable, layer_map: LayerMap, lisa: LisaConfig | None
    ) -> dict[str, Any]:
        """Entries of run.json, the same for every way that a trainer is built."""
        args = self._trainer.args
        entries = describe_run(self._trainer.model, self._config, table, layer_map)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        known: dict[str, Any] = {
            "hardware": {"processes": args.world_size},
            "seeds": {"seed": args.seed, "data_seed": data_seed},
        }
        if lisa is not None:  # whose engine may start after this
            known = joined(known, lisa_entries(lisa, args.seed))
        return joined(joined(entries, known), self._manifest)

    def _continue(self, step: int) -> None:
        """Take up the running totals where the earlier segments left them."""
        run = load(self._run_dir)
        tokens = run.scalars.loc[run.scalars["step"] <= step, "tokens"].dropna()
        self.tokens = int(tokens.iloc[-1]) if len(tokens) else 0
        self.held_out = [*evaluations(run)]


def need_batches(dataloader: Any) -> None:
    """`ConfigError` for data that can be seen to give no batch: nothing would be trained."""
    try:
        length = None if dataloader is None else len(dataloader)
    except TypeError:  # a stream: only its end will tell
        return
    if length == 0:
        raise ConfigError(f"{type(dataloader.dataset).__name__}: {NO_BATCH}")
