"""The folder of a run: claimed before training, kept repeatable, continued where it stands."""

import contextlib
import dataclasses
import errno
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from lisa_analysis.contract import schema
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.command.config import TrainConfig
from lisa_train.command.interruption import Interrupted
from lisa_train.command.tasks import AUTO
from lisa_train.command.tasks.literal_paths import at_home
from lisa_train.command.together import is_first
from lisa_train.measure.disk.storage import RunLock
from lisa_train.methods import METHODS, sections
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.learning.config import PRIORS
from lisa_train.model.run_entries import as_lists

INPUT_PROBABILITIES = "lisa_probabilities.json"
INPUT_PRIOR = "learn_prior.json"
INPUT_PROFILE = "select_profile.json"
INPUT_MULTIPLIERS = "lr_multipliers.json"
_INPUTS = (INPUT_PROBABILITIES, INPUT_PRIOR, INPUT_PROFILE, INPUT_MULTIPLIERS)
CLAIM = ".claim"  # held while a command makes a run of a folder
_OPENED = (schema.PARAMETERS, schema.CONFIG, schema.SCALARS, schema.EVENTS, schema.LOCK)
_STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
)
# What torch.save says of a disk that is full: within a tensor, and as it ends the file.
_OF_TORCH = ("PytorchStreamWriter", "unexpected pos", "iostream error")

# What may differ between a run and its continuation without making it another computation.
_MAY_CHANGE = frozenset(
    {
        "output_dir", "report_to", "logging_steps", "progress_bar", "save_total_limit", "record",
        "resume_incomplete",
        # Another number of processes asks for others; the run says so, see `Continuation`.
        "per_device_train_batch_size", "gradient_accumulation_steps",
    }
)  # fmt: skip


def expand_home(config: TrainConfig) -> TrainConfig:
    """Return the configuration with `~` as the home folder in every local path.

    Some of the libraries below would expand it and some would not.
    """
    changed: dict[str, Any] = {
        name: at_home(getattr(config, name))
        for name in ("model_name_or_path", "dataset_name", "output_dir")
        if getattr(config, name) is not None
    }
    return _with_files(dataclasses.replace(config, **changed), lambda path, _: at_home(path))


def _with_files(config: TrainConfig, changed: Callable[[str, str], str]) -> TrainConfig:
    """Return the configuration with another path of every file of numbers that it names.

    `changed` is given the path, and the file's name in a run directory.
    """
    found: dict[str, Any] = {}
    lisa, learn = config.lisa, config.lisa.learn
    if isinstance(lisa.probabilities, str):
        path = changed(lisa.probabilities, INPUT_PROBABILITIES)
        lisa = dataclasses.replace(lisa, probabilities=path)
    if learn is not None and isinstance(learn.prior, str) and learn.prior not in PRIORS:
        learn = dataclasses.replace(learn, prior=changed(learn.prior, INPUT_PRIOR))
        lisa = dataclasses.replace(lisa, learn=learn)
    if lisa is not config.lisa:
        found["lisa"] = lisa
    if config.select.profile is not None:
        path = changed(config.select.profile, INPUT_PROFILE)
        found["select"] = dataclasses.replace(config.select, profile=path)
    if config.lr_multipliers is not None:
        found["lr_multipliers"] = changed(config.lr_multipliers, INPUT_MULTIPLIERS)
    return dataclasses.replace(config, **found)


def find_run_dir(config: TrainConfig, *, resume: bool) -> Path:
    """Return the run directory; it does not exist yet, is empty, or holds the run to resume."""
    if config.output_dir is None:
        named = Path("runs") / f"{config.method}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
        others = (named.with_name(f"{named.name}-{number}") for number in itertools.count(2))
        return next(path for path in itertools.chain([named], others) if not path.exists())
    run_dir = Path(config.output_dir)
    holds_run = (run_dir / schema.MANIFEST).exists()
    if resume and not holds_run:
        raise RunDirectoryError(f"{run_dir} holds no run to resume; start it without --resume.")
    if holds_run and not resume:
        raise RunDirectoryError(
            f"output_dir {run_dir} already holds a run; choose another folder, or continue it "
            "with --resume."
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise RunDirectoryError(f"output_dir {run_dir} is a file; choose a folder.")
    if run_dir.is_dir() and not resume and any(p.name != CLAIM for p in run_dir.iterdir()):
        raise RunDirectoryError(
            f"output_dir {run_dir} is not empty and holds no run; choose a new or empty folder."
        )
    return run_dir


@contextlib.contextmanager
def no_trace_of_a_refused_run(run_dir: Path) -> Iterator[None]:
    """Make the run directory, and take it away again when the run is refused before it starts.

    Of several processes the first one does. Meanwhile nobody else may begin a run there.
    """
    if not is_first():
        yield
        return
    new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        claim = RunLock(run_dir / CLAIM)
    except OSError as error:
        raise RunDirectoryError(
            f"output_dir {run_dir} cannot be written ({error.strerror or error}); choose a folder "
            "that this user can write to, on a disk with room."
        ) from error
    began = True
    try:
        yield
    except BaseException as error:
        began = (run_dir / schema.MANIFEST).exists()
        if not began:
            _clear(run_dir)
        if isinstance(error, KeyboardInterrupt):
            left = "what was recorded is kept" if began else "nothing was recorded"
            raise Interrupted(left) from error
        raise
    finally:
        claim.release()
        (run_dir / CLAIM).unlink(missing_ok=True)
        for path in () if began else (run_dir / schema.CHECKPOINTS_DIR, *new):
            with contextlib.suppress(OSError):  # a folder that holds something stays
                path.rmdir()


def _clear(run_dir: Path) -> None:
    """Remove what a run writes before there is a run.json; the folder was empty when it began."""
    for name in (*_INPUTS, *_OPENED):
        for path in (run_dir / name, run_dir / f"{name}.tmp"):
            path.unlink(missing_ok=True)
    for name in (schema.METRICS_DIR, schema.PROBES_DIR):
        for path in (run_dir / name).glob("*.tmp"):
            path.unlink()
        with contextlib.suppress(OSError):
            (run_dir / name).rmdir()


def keep_inputs(config: TrainConfig, run_dir: Path, *, resume: bool) -> TrainConfig:
    """Return the configuration that repeats the run from anywhere; keep what it needs.

    Local paths are made absolute; a file of probabilities, scores or multipliers is copied into
    the run directory.
    """
    config = dataclasses.replace(
        config,
        output_dir=None,
        model_name_or_path=_absolute(config.model_name_or_path),
        dataset_name=_absolute(config.dataset_name),
    )
    config = _with_files(config, lambda path, name: _keep(path, run_dir / name, resume=resume))
    if resume:
        _check_same(config, run_dir / schema.CONFIG)
    return config


def _keep(source: str, kept: Path, *, resume: bool) -> str:
    """Copy a file that the settings name into the run directory; return where it is then."""
    if not resume:
        kept.write_bytes(Path(source).read_bytes())
        return str(kept.resolve())
    if not kept.exists():  # a run of before the file was kept
        return source
    if Path(source).read_bytes() != kept.read_bytes():
        raise ConfigError(
            f"{source} is not the file that the run to resume began with, which is {kept}; a "
            f"continued run keeps its settings: use --config {kept.with_name(schema.CONFIG)}."
        )
    return str(kept.resolve())


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _check_same(config: TrainConfig, path: Path) -> None:
    import yaml

    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict):
            raise TypeError(f"it holds {type(kept).__name__}, not settings")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RunDirectoryError(
            f"{path} cannot be read ({reason}), and without it nobody knows whether these are the "
            "run's settings: restore the file to resume the run."
        ) from error
    now = as_lists(dataclasses.asdict(config))
    # A run of an earlier version did not know every setting of today's.
    defaults = as_lists(dataclasses.asdict(TrainConfig("", "")))
    for name, value in now.items():
        before = kept.get(name, defaults[name])
        if name == "lisa" and isinstance(before, dict):
            before = as_lists(dataclasses.asdict(LisaConfig())) | before
        if name not in _MAY_CHANGE and before != value:
            raise ConfigError(
                f"{name} is {value} but the run to resume had {before}; a continued run "
                f"keeps its settings: use --config {path}."
            )


def to_yaml(config: TrainConfig) -> str:
    """Write a configuration as the YAML that `lisa-train --config` reads."""
    import yaml

    settings = dataclasses.asdict(config)
    # Runs of an earlier version have no such lines, and are told from these by nothing.
    brought = [f.name for f in dataclasses.fields(sections())]
    for section in ("probe", "peft", "select", *brought):
        if section not in METHODS[config.method].sections:
            del settings[section]
    if config.task == AUTO:
        del settings["task"]
    if not config.columns:
        del settings["columns"]
    return yaml.safe_dump(as_lists(settings), sort_keys=False, allow_unicode=True)


def last_checkpoint(run_dir: Path) -> Path:
    """Return the newest whole checkpoint: one that a kill cut short is passed over."""
    folder = run_dir / schema.CHECKPOINTS_DIR
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    for _, path in sorted(found, reverse=True):
        # Trainer writes this file last: where it can be read, the others are there.
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
    raise RunDirectoryError(
        f"{run_dir} holds no checkpoint to resume from; set save_steps when starting a run "
        "that is to be resumed, and start this one again in a new folder."
    )


def check_unfinished(checkpoint: Path) -> None:
    """Refuse to resume a run that has made all its steps: Trainer would make one more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= state["max_steps"]:
        raise RunDirectoryError(
            f"{checkpoint} is the end of a run that has made all its {state['max_steps']} steps; "
            "there is nothing to resume: its weights stand in that folder."
        )


def is_storage_error(error: Exception) -> bool:
    """Whether a file could not be written; each library that writes has an error of its own."""
    return (
        (isinstance(error, OSError) and error.errno in _STORAGE_ERRORS)
        or type(error).__name__ == "SafetensorError"
        or (isinstance(error, RuntimeError) and any(said in str(error) for said in _OF_TORCH))
        or "(os error 28)" in str(error)  # of the library of tokenizers, whose error is of no kind
    )
