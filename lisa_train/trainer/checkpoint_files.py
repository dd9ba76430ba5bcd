"""What a checkpoint of Trainer must hold so that a resumed training goes on to the bit.

Trainer itself asks for little: without `optimizer.pt` or `scheduler.pt` it begins with an empty
optimizer and a new warm-up, without `rng_state.pth` with other random numbers, and says nothing.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.model.module_tree import unwrap
from lisa_train.model.sharding import is_sharded
from lisa_train.trainer.lisa_callback import STATE_KEY, TENSORS_FILE
from lisa_train.trainer.renamed_weights import is_renamed

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that Trainer can load, and what it lacks for an exact continuation.

    Attributes
    ----------
    path
        The folder.
    state
        Content of its `trainer_state.json`.
    processes
        How many processes wrote it, as far as its files tell.
    missing
        What it lacks, each in words.
    renamed
        Whether its weights bear other names than the model's, so that Trainer passes them over.
    """

    path: Path
    state: dict[str, Any]
    processes: int | None
    missing: tuple[str, ...]
    renamed: bool = False


def examine(trainer: Trainer, path: Path, lisa: LisaConfig | None) -> Checkpoint:
    """Look through a checkpoint that `trainer` is to resume from.

    Raises
    ------
    RunDirectoryError
        When it is no checkpoint, or lacks what no training can go on without, or when a file is
        damaged: then Trainer would fail in the middle of loading.
    """
    if not path.is_dir():
        raise RunDirectoryError(
            f"{path} is no folder to resume from: give a checkpoint that Trainer wrote."
        )
    if _sharded_by_transformers(trainer):
        raise RunDirectoryError(
            f"{path} cannot be resumed from: transformers keeps no optimizer state of a model that "
            "it has split over processes (DistributedConfig), and its Trainer cannot load weights "
            "into one. Begin anew from its weights (from_pretrained), or train in a loop, "
            "whose resume is exact (docs/several-gpus.md)."
        )
    state = _state(path)
    _check_weights(trainer, path)
    processes = _processes(path)
    missing = [*_optimizer(trainer, path), *_random_numbers(trainer, path, processes)]
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and not _whole(path / "scaler.pt"):
        missing.append("the loss scale (scaler.pt)")
    if lisa is not None:
        if STATE_KEY not in (state.get("stateful_callbacks") or {}):
            missing.append(f"LISA's schedule ({STATE_KEY} in {STATE})")
        if lisa.precision == "fp32_active" and not _whole(path / TENSORS_FILE):
            missing.append(f"LISA's weights and optimizer state in fp32 ({TENSORS_FILE})")
    if getattr(trainer.args, "sync_ref_model", False):
        missing.append("the reference model as it was synchronised (sync_ref_model is set)")
    if trainer.args.ignore_data_skip:
        missing.append("the place in the data (ignore_data_skip is set)")
    whole = isinstance(unwrap(trainer.model), PreTrainedModel) and not _sharded(trainer)
    renamed = whole and is_renamed(trainer.model, path)
    return Checkpoint(path, state, processes, tuple(missing), renamed)


def _state(path: Path) -> dict[str, Any]:
    state = _read_json(path / STATE, "nobody knows which step the training had reached")
    if not all(isinstance(state.get(name), int) for name in ("global_step", "max_steps")):
        raise RunDirectoryError(
            f"{path / STATE} does not say which step the training had reached; resume from another "
            "checkpoint."
        )
    return state


def _check_weights(trainer: Trainer, path: Path) -> None:
    """`RunDirectoryError` without weights that this trainer would load."""
    if _sharded(trainer):
        return  # folders of torch's, FSDP's or DeepSpeed's own, which they check
    if hasattr(trainer.model, "peft_config"):
        folders = [path, *(folder for folder in path.iterdir() if folder.is_dir())]
        if not hasattr(trainer.model, "get_base_model"):
            raise RunDirectoryError(
                f"{path} cannot be resumed from: the adapter was added by model.add_adapter, and "
                "Trainer loads checkpoints of such a model without its adapter. Wrap the model "
                "with peft.get_peft_model, or begin anew from the adapter (model.load_adapter)."
            )
        names = ("adapter_model.safetensors", "adapter_model.bin")
        found = [f / n for f in folders for n in names if (f / n).exists()]
        wanted = "adapter_model.safetensors"
        for file in found:
            _read_json(file.parent / "adapter_config.json", "the adapter cannot be loaded")
    else:
        whole = (path / name for name in ("model.safetensors", "pytorch_model.bin"))
        found = [file for file in whole if file.exists()] or _pieces(path)
        wanted = "model.safetensors"
    if not found:
        raise RunDirectoryError(
            f"{path} lacks the weights ({wanted}): it cannot be resumed from; take another "
            "checkpoint."
        )
    for file in found:
        if not _whole(file):
            raise RunDirectoryError(
                f"{path} lacks the weights ({file.name}): the index names a file that is not "
                "there; resume from another checkpoint."
            )


def _pieces(path: Path) -> list[Path]:
    """Files that an index names."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            content = _read_json(path / index, "the weights cannot be found")
            return [path / name for name in sorted(set(dict(content["weight_map"]).values()))]
    return []


def _optimizer(trainer: Trainer, path: Path) -> list[str]:
    """The optimizer's state and the learning-rate schedule: Trainer loads both, or none."""
    if getattr(trainer, "is_deepspeed_enabled", False):
        return []
    state = _whole(path / "optimizer.pt") or _whole(path / "optimizer.bin")
    state = state or any(folder.is_dir() for folder in path.glob("optimizer*"))
    schedule = _whole(path / "scheduler.pt")
    missing = []
    if not state:
        missing.append("the optimizer's state (optimizer.pt)")
    if not schedule:
        also = ", without which Trainer loads no optimizer state either" if state else ""
        missing.append(f"the place in the learning-rate schedule (scheduler.pt{also})")
    elif not state:
        missing.append("and without it Trainer restarts the learning-rate schedule too")
    return missing


def _random_numbers(trainer: Trainer, path: Path, processes: int | None) -> list[str]:
    count = trainer.args.world_size
    if processes is not None and processes != count:
        return []  # said as a change of the number of processes
    name = "rng_state.pth" if count <= 1 else f"rng_state_{trainer.args.process_index}.pth"
    return [] if _whole(path / name) else [f"the state of the random numbers ({name})"]


def _processes(path: Path) -> int | None:
    if (path / "rng_state.pth").exists():
        return 1
    return len(list(path.glob("rng_state_*.pth"))) or None


def _sharded_by_transformers(trainer: Trainer) -> bool:
    return any(is_sharded(parameter) for parameter in trainer.model.parameters()) and bool(
        getattr(trainer, "is_distributed_loading_by_transformers", False)
    )


def _sharded(trainer: Trainer) -> bool:
    return any(getattr(trainer, f"is_{x}_enabled", False) for x in ("deepspeed", "fsdp"))


def _read_json(file: Path, without: str) -> dict[str, Any]:
    """Content of a file that no training can go on without."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{file.parent} lacks {file.name}, and without it {without}; resume from another "
            "checkpoint."
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"{file} cannot be read ({type(error).__name__}: {error}), and without it {without}; "
            "resume from another checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise RunDirectoryError(
            f"{file} holds {type(content).__name__}, expected an object; resume from another "
            "checkpoint."
        )
    return content


def _whole(file: Path) -> bool:
    """Whether a file of torch or safetensors is there; `RunDirectoryError` if it is damaged."""
    if not file.is_file():
        return False
    check = _whole_safetensors if file.suffix == ".safetensors" else zipfile.is_zipfile
    if not check(file):
        raise RunDirectoryError(
            f"{file} is damaged (its end is missing, or it is no file of torch's): resume from "
            "another checkpoint."
        )
    return True


def _whole_safetensors(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
