"""A finished run whose change is measured: its trained model, and the base it came from."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract import schema
from lisa_analysis.contract.errors import ConfigError, LisaError, RunDirectoryError, suggest
from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.run import Run
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.literal_paths import at_home

if TYPE_CHECKING:
    from torch import nn

    from lisa_train.command.config import TrainConfig
    from lisa_train.command.tasks.classes import TaskWithClasses
    from lisa_train.command.tasks.task import Loaded, Task
    from lisa_train.measure.ablation.change import LearnedChange

FINAL_MODEL = f"{schema.CHECKPOINTS_DIR}/final"
ADAPTER_CONFIG = "adapter_config.json"
_SPLITS = ("fsdp", "fsdp_config", "parallelism_config")


@dataclass
class TrainedRun:
    """A finished run with its model, ready to be measured.

    Attributes
    ----------
    run
        The run directory.
    config
        Its settings; None where another tool trained it.
    model
        The trained model.
    folder
        Where its weights or its adapter are; None for a model that was handed over.
    loaded
        Model, processor and data as the run's task loads them; None where another tool trained.
    change
        What it learned.
    about
        Metadata of the ablation, see `lisa_analysis.contract.schema.ABLATION_FIELDS`.
    task
        The task that loaded it; None where another tool trained.
    """

    run: Run
    config: "TrainConfig | None"
    model: Any
    folder: Path | None
    loaded: "Loaded | None"
    change: "LearnedChange"
    about: dict[str, Any]
    task: "Task | None" = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a language model; None without one."""
        return None if self.loaded is None else self.loaded.processor

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter was trained."""
        return bool(getattr(self.model, "peft_config", None))


def open_run(run_dir: str | Path) -> Run:
    """Open a run whose training is over.

    Raises
    ------
    RunDirectoryError
        When there is none, it is being trained, or it trained nothing.
    """
    run = load(Path(at_home(str(run_dir))))
    if not run.has_course:
        raise RunDirectoryError(
            f"{run.path} holds weights alone, no run: give the folder that lisa-train wrote."
        )
    if run.status == "running":
        raise RunDirectoryError(
            f"{run.path} is being trained at the moment: wait until the run ends to ablate it."
        )
    if run.is_probe:
        raise RunDirectoryError(
            f"{run.path} is a probe, which trains nothing: there is no change to ablate."
        )
    return run


def load_trained(
    run: Run,
    model: "nn.Module | str | Path | None" = None,
    base: str | Path | None = None,
    data: Any = None,
) -> TrainedRun:
    """Load a run's trained model and find its base.

    Parameters
    ----------
    run
        The run.
    model
        The trained model or its folder, where it is not in the run directory.
    base
        Folder or hub id of the base, where it is not as config.yaml names it.
    data
        A dataset in the place of the run's own; examples are no business of this function.

    Raises
    ------
    ConfigError, RunDirectoryError
        When the trained weights or the base are missing, or do not belong together.
    """
    from torch import nn

    from lisa_train.measure.ablation.change import LearnedChange
    from lisa_train.measure.step.base_weights import StoredWeights

    config = read_config(run)
    layers = config.record.layers if config is not None else None
    base_name = at_home(str(base)) if base is not None else _base_name(run, config, model)
    revision = config.model_revision if config is not None and base is None else None
    where = _base_files(base_name, revision, run)
    if isinstance(model, nn.Module):
        change = LearnedChange(model, StoredWeights(model, where), None, layers)
        about = _about(change, "a model that was handed over", base_name)
        return TrainedRun(run, config, model, None, None, change, about)
    folder = _trained_folder(run, model)
    config, task, found = _load(run, config, folder, base_name, data)
    loaded = found.model
    trained = None
    if not (folder / ADAPTER_CONFIG).is_file():
        from lisa_train.measure.step.base_weights import find_checkpoint

        trained = StoredWeights(loaded, find_checkpoint(str(folder)))
    change = LearnedChange(loaded, StoredWeights(loaded, where), trained, layers)
    if not change.parts:
        raise LisaError(
            f"the trained model of {run.path} is the base {base_name}, to the last bit: it learned "
            "nothing, or the base is not the one that was trained (name that with --base)."
        )
    inside = folder.resolve().is_relative_to(run.path.resolve())
    name = str(folder.resolve().relative_to(run.path.resolve())) if inside else str(folder)
    return TrainedRun(
        run, config, loaded, folder, found, change, _about(change, name, base_name), task
    )


def _about(change: "LearnedChange", model: str, base: str) -> dict[str, Any]:
    tensor = next(change.model.parameters())
    kinds = {p.dtype for p in change.model.parameters() if p.is_floating_point()}
    return {
        "model": model,
        "base": base,
        "dtype": ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
        "device": tensor.device.type,
        "unmeasured": change.unmeasured,
    }


def read_config(run: Run) -> "TrainConfig | None":
    """Read a run's config.yaml; None where there is none.

    Raises
    ------
    ConfigError
        When it cannot be read.
    """
    from lisa_train.command.cli import parse

    path = run.path / schema.CONFIG
    if not path.is_file():
        return None
    config = parse(["--config", str(path)]).config
    # Measured as it is stored: an ablation is exact, and makes no gradients.
    # By itself too: a model that was split while it trained is whole here.
    given = {name: value for name, value in config.trainer_args.items() if name not in _SPLITS}
    return dataclasses.replace(
        config, trainer_args=given, bf16=False, fp16=False, gradient_checkpointing=False,
        report_to=(), eval_steps=None, save_steps=None, progress_bar=False, step_in_backward=False,
        eight_bit_states=None, optim="adamw_torch",
    )  # fmt: skip


def _base_name(run: Run, config: "TrainConfig | None", model: Any) -> str:
    if config is not None:
        return config.model_name_or_path
    adapter = getattr(model, "peft_config", None)
    if isinstance(model, str | Path) and (Path(model) / ADAPTER_CONFIG).is_file():
        text = (Path(model) / ADAPTER_CONFIG).read_text(encoding="utf-8")
        return str(json.loads(text).get("base_model_name_or_path"))
    if adapter:
        return str(next(iter(adapter.values())).base_model_name_or_path)
    raise ConfigError(
        f"{run.path} does not say what it was trained from (it has no {schema.CONFIG}): name the "
        "base with --base FOLDER (in Python base=)."
    )


def _base_files(name: str, revision: str | None, run: Run) -> dict[str, Path]:
    from lisa_train.measure.step.base_weights import find_checkpoint

    path = Path(name)
    here = path.is_dir()
    if not here and (path.is_absolute() or name.startswith((".", "~")) or path.exists()):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"the base {name} of {run.path} is no folder here: name it with --base FOLDER (in "
            f"Python base=).{suggest(path.name, siblings)}"
        )
    found = find_checkpoint(name, revision)
    if not found and here:
        raise ConfigError(
            f"the base {name} holds no model.safetensors and no index of one: write it with "
            "save_pretrained, and name that folder with --base FOLDER (in Python base=)."
        )
    if not found:
        raise ConfigError(
            f"the base {name} of {run.path} is not in this machine's cache of the hub: name a "
            "folder that holds it with --base FOLDER (in Python base=)."
        )
    return found


def _trained_folder(run: Run, model: str | Path | None) -> Path:
    if model is not None:
        folder = Path(at_home(str(model)))
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise ConfigError(
                f"--model {folder} holds neither config.json nor {ADAPTER_CONFIG}; expected the "
                "folder of a trained model or adapter."
            )
        return folder
    for name in (schema.ADAPTER_DIR, FINAL_MODEL):
        if any((run.path / name / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            return run.path / name
    checkpoints = sorted((run.path / schema.CHECKPOINTS_DIR).glob("checkpoint-*"))
    hint = f" (it has {checkpoints[-1].name}, unfinished as it is)" if checkpoints else ""
    raise RunDirectoryError(
        f"{run.path} holds no trained weights, neither {schema.ADAPTER_DIR}/ nor {FINAL_MODEL}/: "
        "save_final_model was off, or the run did not end; name their folder with --model "
        f"FOLDER (in Python model=){hint}."
    )


def _load(
    run: Run, config: "TrainConfig | None", folder: Path, base: str, data: Any
) -> "tuple[TrainConfig, Task, Loaded]":
    """Load model, processor and data as the run's task does; with the settings for that."""
    from lisa_train.command.tasks.classes import TaskWithClasses
    from lisa_train.command.tasks.task import choose_task

    if config is None:
        raise ConfigError(
            f"{run.path} was not trained by lisa-train (it has no {schema.CONFIG}), so how its "
            "model is loaded is not known: give the loaded model, lt.ablate(run_dir, model=…)."
        )
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if not adapter and _has_processor(base) and not _has_processor(folder):
        raise RunDirectoryError(
            f"{folder} holds no preprocessor_config.json, without which no example can be made "
            f"into inputs: copy that of {base} into it."
        )
    source = base if adapter else str(folder)
    revision = config.model_revision if source == config.model_name_or_path else None
    named = dataclasses.replace(config, model_name_or_path=source, model_revision=revision)
    task = choose_task(named)
    if isinstance(data, str | Path):
        if isinstance(task, TaskWithClasses):
            task.learned = _classes_of(run, task, named, adapter=adapter)
        named = dataclasses.replace(
            named, dataset_name=at_home(str(data)), eval_size=0, max_eval_samples=None,
            max_train_samples=None,
        )  # fmt: skip
    found = task.load(_with_a_split_that_is_there(named, task))
    if adapter:
        found.model = _with_adapter(found.model, folder, base)
    return named, task, found


def _classes_of(
    run: Run, task: "TaskWithClasses", config: "TrainConfig", *, adapter: bool
) -> tuple[str, ...]:
    """Classes of the trained head, by their numbers; of an adapter the run's own data have them."""
    if not adapter:
        names = task.source(config).id2label
        return tuple(str(names[number]) for number in sorted(names))
    try:
        return task.learned_classes(_with_a_split_that_is_there(config, task))
    except ConfigError as error:
        raise ConfigError(
            f"which class of {run.path} has which number stands in its own data, which cannot be "
            f"read: {error}"
        ) from error


def _with_a_split_that_is_there(config: "TrainConfig", task: "Task") -> "TrainConfig":
    """Take a missing held-out split for none: other data, and runs of before, may lack it."""
    from lisa_train.command.tasks.data import read_splits
    from lisa_train.command.tasks.splits import asks_for_test_split

    if not asks_for_test_split(config):
        return config
    name, splits = config.dataset_test_split, getattr(task, "splits", read_splits)(config)
    if name in splits and name != config.dataset_train_split:
        return config
    return dataclasses.replace(config, dataset_test_split=None)


def _has_processor(folder: str | Path) -> bool:
    names = ("preprocessor_config.json", "processor_config.json")
    return any((Path(folder) / name).is_file() for name in names)


def _with_adapter(model: Any, folder: Path, base: str) -> Any:
    """Put a saved adapter on; one that does not fit the base is another model's."""
    from peft import PeftModel

    def say(reason: str) -> str:
        return (
            f"the adapter {folder} does not fit the base {base} ({reason[:200]}): it is another "
            "model's; name its own with --base FOLDER (in Python base=)."
        )

    with refusals(say), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(model, str(folder))
