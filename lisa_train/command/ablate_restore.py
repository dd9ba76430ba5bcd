"""`restore(run_dir, layers, out)`: the trained model or adapter with some layers put back."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_analysis.contract.layers import canonical_name, module_of
from lisa_analysis.contract.schema import ABLATION, LOCK
from lisa_train.command.ablate_inputs import ADAPTER_CONFIG, TrainedRun, load_trained, open_run
from lisa_train.command.ablate_run import MAX_EXAMPLES, check_max_examples, prepare_examples
from lisa_train.command.model_card import tell_put_back
from lisa_train.command.output import is_storage_error
from lisa_train.command.tasks.literal_paths import at_home

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lisa_train.measure.ablation.losses import ExampleLosses, Examples
    from lisa_train.measure.ablation.summary import Effect
    from lisa_train.measure.ablation.units import Part

PROVENANCE = "restored.json"
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Restored:
    """A model or adapter with some layers put back.

    Attributes
    ----------
    path
        Its folder.
    units
        What was put back.
    losses
        Mean loss per label of the base, the trained and the restored model, by data.
    changes
        Loss of the restored model minus that of the trained one, by data.
    """

    path: Path
    units: tuple[str, ...]
    losses: dict[str, tuple[float, float, float]]
    changes: "dict[str, Effect]"

    def __str__(self) -> str:
        return "\n".join(_said(self))


def restore(
    run_dir: str | Path,
    layers: str | Iterable[str | int],
    out: str | Path,
    *,
    data: Any = None,
    general: str | Path | bool | None = None,
    max_examples: int | None = MAX_EXAMPLES,
    model: "nn.Module | str | Path | None" = None,
    base: str | Path | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    say: Callable[[str], None] = print,
) -> Restored:
    """Write the trained model or adapter with some layers as they were before training.

    What that does to the losses is measured and said before anything is written.

    Parameters
    ----------
    run_dir
        A finished run.
    layers
        Layers, ranges and groups (``"3,17,20-22,embed"``, or a list of them); ``"auto"`` takes
        the layers that the run's ablation proposes: those that surely cost more on general text
        than they can help on held-out examples.
    out
        The folder to write; it is new or empty. An adapter is written for an adapter, a model for
        a model.
    data, general, max_examples, model, base, collate
        As in `lisa_train.ablate`.
    say
        Takes what was measured, line by line.

    Returns
    -------
    Restored

    Raises
    ------
    ConfigError
        For layers that there are not, a folder that holds something, or an adapter that cannot
        be written without them.
    RunDirectoryError
        When the run has no trained weights, or ``auto`` finds no ablation.
    """
    from lisa_train.measure.ablation.units import choose_units
    from lisa_train.measure.disk.storage import RunLock

    check_max_examples(max_examples)
    folder = Path(at_home(str(out)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {folder} holds something already; name a new folder.")
    run = open_run(run_dir)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing trains
            held.callback(RunLock(run.path / LOCK).release)
        trained = load_trained(run, model, base, data)
        words = proposed(trained) if layers == "auto" else layers
        units, parts = choose_units(words, trained.change.parts, len(trained.change))
        if trained.is_adapter:
            check_adapter(trained, parts)
        losses, examples = prepare_examples(trained, data, general, max_examples, collate)
        found = _measure(trained, losses, examples, parts, units, folder)
        for line in _said(found):
            say(line)
        _write(trained, parts, found)
    say(f"Written to {folder}")
    return found


def proposed(trained: TrainedRun) -> Sequence[str]:
    """Return the layers that the run's ablation proposes to put back.

    Raises
    ------
    RunDirectoryError
        When there is no ablation with general text.
    ConfigError
        When it proposes none.
    """
    from lisa_train.measure.ablation.file import AblationFile, Key
    from lisa_train.measure.ablation.summary import summarize
    from lisa_train.measure.ablation.units import make_units

    path = trained.run.path
    file = AblationFile(path, trained.about, {})
    units = make_units(trained.change.parts, trained.change.kinds)
    if any(Key(u.name, None, "reset", "general") not in file.losses for u in units):
        raise RunDirectoryError(
            f"{path / ABLATION} does not tell which layers to put back: run lisa-ablate {path} "
            "first, with general text, or name the layers."
        )
    found = summarize(file, units).proposed
    if not found:
        raise ConfigError(
            "no layer surely costs more on general text than it can help on held-out examples: the "
            "ablation proposes none to put back; name the layers yourself."
        )
    return found


def _measure(
    trained: TrainedRun,
    losses: "ExampleLosses",
    examples: "dict[str, Examples]",
    parts: "Sequence[Part]",
    units: Sequence[str],
    folder: Path,
) -> Restored:
    """Losses of the base, the trained and the restored model."""
    import numpy as np
    import torch

    from lisa_train.measure.ablation.summary import effect

    def measured(name: str) -> "np.ndarray[Any, Any]":
        found = np.empty(len(examples[name].measured.tokens))
        with torch.no_grad():
            for batch in examples[name].batches:
                found[list(batch.examples)] = losses(trained.model, batch.inputs).numpy()
        return found

    change = trained.change
    with change.as_found():
        after = {name: measured(name) for name in examples}
        with change.put(parts, "base"):
            restored = {name: measured(name) for name in examples}
        change.become("base")
        before = {name: measured(name) for name in examples}
    tokens = {name: one.measured.tokens for name, one in examples.items()}
    means = {
        name: tuple(float(x[name].sum() / tokens[name].sum()) for x in (before, after, restored))
        for name in examples
    }
    changes = {name: effect(restored[name], after[name], tokens[name]) for name in examples}
    return Restored(folder, tuple(units), means, changes)  # type: ignore[arg-type]


def _said(found: Restored) -> list[str]:
    said = [f"Put back: {', '.join(found.units)}"]
    for name, what in (("held_out", "held-out"), ("general", "general")):
        if name in found.losses:
            before, after, now = found.losses[name]
            said.append(
                f"{what} loss: base {before:.4f}, trained {after:.4f}, with these put back "
                f"{now:.4f} ({found.changes[name]} nats per label)"
                f"{_what_stays(name, before, after, now)}"
            )
    if found.changes["held_out"].above_zero:
        said.append(
            "Together they surely cost held-out loss, whatever each does by itself: layers stand "
            "in for each other. Fewer of them keep more of the gain."
        )
    return said


def _what_stays(name: str, before: float, after: float, now: float) -> str:
    """Part of the training's gain, or of what it forgot, that is still there."""
    was, stays = (before - after, before - now) if name == "held_out" else (
        after - before, now - before
    )  # fmt: skip
    if was <= 0:
        return ""
    part = f"{stays / was:.0%}" if stays > 0 else "nothing"
    return f": {part} of the {'gain' if name == 'held_out' else 'forgetting'} stays"


def check_adapter(trained: TrainedRun, parts: "Sequence[Part]") -> None:
    """Refuse, before anything is measured, what an adapter's files cannot say."""
    for part in parts:
        kind = type(part.module).__name__
        if kind == "TrainableTokensWrapper" or (
            part.module is not None and not hasattr(_settings(trained), "exclude_modules")
        ):
            raise ConfigError(
                f"the adapter of {part.name} ({kind}) cannot be left out of an adapter's files; "
                "put other layers back, or scale it down where the model is loaded."
            )
    if trained.folder is None or not (trained.folder / _ADAPTER).is_file():
        raise ConfigError(
            f"restore writes an adapter from its own files, and there is no {_ADAPTER} in "
            f"{trained.folder or 'the model that was handed over'}: give the adapter's folder with "
            "--model (in Python model=)."
        )


def _settings(trained: TrainedRun) -> Any:
    return next(iter(trained.model.peft_config.values()))


def _write(trained: TrainedRun, parts: "Sequence[Part]", found: Restored) -> None:
    """Write the files, whole under their name or not at all."""
    folder = found.path
    partial = folder.with_name(f".{folder.name}-{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        if trained.is_adapter:
            _write_adapter(trained, parts, partial)
        else:
            change = trained.change
            with change.as_found(), change.put(parts, "base"):
                trained.model.save_pretrained(partial)
            if trained.tokenizer is not None:
                trained.tokenizer.save_pretrained(partial)
        _tell_where_from(found, trained, partial)
        if folder.is_dir():
            folder.rmdir()
        partial.replace(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not (isinstance(error, Exception) and is_storage_error(error)):
            raise
        reason = getattr(error, "strerror", None) or error
        text = f"--output {folder} cannot be written ({reason}); nothing was left there."
        raise RunDirectoryError(text) from error


def _write_adapter(trained: TrainedRun, parts: "Sequence[Part]", folder: Path) -> None:
    """Copy an adapter without the modules of `parts`: PEFT leaves those as the base has them."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    source = trained.folder
    assert source is not None
    for file in source.iterdir():
        if file.is_file() and file.name not in (_ADAPTER, ADAPTER_CONFIG):
            shutil.copyfile(file, folder / file.name)
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    copies = {p.name: p.module for p in parts if hasattr(p.module, "modules_to_save")}
    factors = {p.name: p.module for p in parts if p.module is not None and p.name not in copies}
    wrapped = {n: m for n, m in factors.items() if hasattr(m, "parameter_name")}
    left_out = sorted(set(factors) - set(wrapped))
    before = settings.get("exclude_modules") or []
    if left_out:
        if isinstance(before, str):
            raise ConfigError(
                f"the adapter leaves out modules by the pattern {before!r}, to which no names can "
                "be added: write the names instead into exclude_modules of its configuration."
            )
        settings["exclude_modules"] = sorted({*before, *left_out})
    tensors = {p.name: p.number for p in parts if p.tensor is not None}
    values = trained.change.base_values(tensors.values())
    state: dict[str, torch.Tensor] = {}
    with safe_open(str(source / _ADAPTER), framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        keys = file.keys()
        for key in keys:
            module = module_of(key)
            value = file.get_tensor(key)
            if module in left_out:
                continue
            if module in wrapped:
                value = value.zero_() if ".lora_B." in key else value
            elif module in copies:
                own = dict(copies[module].original_module.named_parameters())
                value = own[key.rsplit(".", 1)[-1]].detach().cpu()
            elif canonical_name(key) in tensors:
                value = values[tensors[canonical_name(key)]]
            state[key] = value.contiguous().clone()
    _forget_patterns(settings, {module_of(key) for key in state})
    save_file(state, str(folder / _ADAPTER), metadata)
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _forget_patterns(settings: dict[str, Any], modules: set[str]) -> None:
    """Take out ranks and scales of modules that are no longer there: PEFT warns of them."""
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        settings[name] = {
            pattern: value
            for pattern, value in patterns.items()
            if any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules)
        }


def _tell_where_from(found: Restored, trained: TrainedRun, folder: Path) -> None:
    """Write beside the weights what they are."""
    about = {
        "run_id": trained.run.run_id,
        "base": trained.about["base"],
        "put_back": list(found.units),
        "loss_per_label": {
            name: dict(zip(("base", "trained", "restored"), values, strict=True))
            for name, values in found.losses.items()
        },
    }
    text = json.dumps(about, indent=2, ensure_ascii=False)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")
    if trained.folder is not None:
        tell_put_back(trained.folder, folder, _said(found))
