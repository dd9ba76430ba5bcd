"""The card of a trained model: what it was made of and how, and what was measured; README.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lisa_analysis.contract.schema import MANIFEST, METRICS_DIR, SCALARS
from lisa_analysis.rundir.events import chosen, draw_events
from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.run import Run

CARD = "README.md"
# Entries of `result` that are told, in words; the others stand in run.json.
_MEASURED = {
    "steps": "optimizer steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "first_held_out_loss": "held-out loss before",
    "last_held_out_loss": "held-out loss after",
    "best_step": "step that these weights are of",
    "best_held_out_loss": "held-out loss of these weights",
    "peak_memory_bytes": "peak memory, bytes",
    "layers_never_drawn": "layers never drawn",
}


def write_card(run_dir: Path, folder: Path, *, adapter: bool) -> Path:
    """Write the card of the model or adapter in `folder` from what its run directory says.

    Parameters
    ----------
    run_dir
        The run, whose training has ended.
    folder
        Where the weights are.
    adapter
        Whether they are an adapter of PEFT.

    Returns
    -------
    pathlib.Path
        The card.
    """
    path = folder / CARD
    path.write_text(card(load(run_dir), adapter=adapter), encoding="utf-8")
    return path


def tell_put_back(before: Path, folder: Path, said: Sequence[str]) -> None:
    """Write the card of a model into `folder` again, with what was put back in it since.

    Parameters
    ----------
    before
        Where the model was; without a card there is none to write.
    folder
        Where it is now.
    said
        What was put back, and what that did, line by line.
    """
    if not (before / CARD).is_file():
        return
    lines = [
        (before / CARD).read_text(encoding="utf-8").rstrip(),
        "## Layers put back",
        "\n".join(f"- {line}" for line in said),
        "Every other number of this card is of the model before that.",
    ]
    (folder / CARD).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def card(run: Run, *, adapter: bool) -> str:
    """Return the card as Markdown, with the front matter that the hub reads.

    Folders of this machine are named by their last part alone.
    """
    import yaml

    manifest = run.manifest
    base, data = _name(manifest, "model"), _name(manifest, "dataset")
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": ["lisa-toolkit", manifest["method"]],
    }
    if _on_the_hub(manifest, "model"):
        front["base_model"] = base
    if _on_the_hub(manifest, "dataset"):
        front["datasets"] = [data]
    what = "adapter for" if adapter else "model, fine-tuned from"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {manifest['run_id']}",
        f"{'An' if adapter else 'A'} {what} {base}.",
        _method(manifest),
        _draws(run),
        _table("Measured", _measured(manifest.get("result") or {})),
        _table("Training", _training(manifest, data)),
        "The numbers are those of this one run, written by lisa-toolkit; a held-out loss is the "
        f"mean per label. What every layer did stands in the run directory (`{MANIFEST}`, "
        f"`{SCALARS}`, `{METRICS_DIR}/`), which `lisa-analyze` reads.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(manifest: Mapping[str, Any]) -> str:
    """The method with its settings; of LISA how likely each layer was drawn, and by which file."""
    method = manifest["method"]
    settings = manifest.get(method) or {}
    lines = [f"## Method: {method}"]
    plain = {k: v for k, v in settings.items() if not isinstance(v, list | dict) and v is not None}
    probabilities = settings.get("probabilities")
    if isinstance(probabilities, str):
        plain["probabilities"] = Path(probabilities).name
    if plain:
        lines.append(_rows(("setting", "value"), plain))
    return "\n\n".join(lines)


def _draws(run: Run) -> str:
    """How likely LISA's last draw held each layer, and how often it was drawn."""
    draws = draw_events(run)
    if not draws:
        return ""
    pi, visits = draws[-1][2], chosen(run).sum(axis=0)
    lines = [f"Layers in {len(draws)} draws:", "", "| layer | π of the last draw | draws |",
             "|---|---|---|"]  # fmt: skip
    for layer, name in enumerate(run.layer_names):
        chance = "not logged" if pi is None else f"{pi[layer]:.4f}"
        lines.append(f"| {name} | {chance} | {int(visits[layer])} |")
    return "\n".join(lines)


def _measured(result: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: result.get(name) for name in _MEASURED}
    found = {_MEASURED[name]: value for name, value in given.items() if value is not None}
    for which, whose in (("last", ""), ("best", " of these weights")):
        for name, value in (result.get(f"{which}_held_out_scores") or {}).items():
            found[f"held-out {name.replace('_', ' ')}{whose}"] = value
    return found


def _training(manifest: Mapping[str, Any], data: str) -> dict[str, Any]:
    found = {"dataset": data, "task": manifest.get("task")}
    found |= manifest.get("seeds") or {}
    versions = manifest.get("versions") or {}
    found |= {name: versions.get(name) for name in ("torch", "transformers", "peft", "trl")}
    return {name: value for name, value in found.items() if value is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    return f"## {title}\n\n{_rows(('', ''), rows)}" if rows else ""


def _rows(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:,.4f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _name(manifest: Mapping[str, Any], part: str) -> str:
    name = str((manifest.get(part) or {}).get("name") or "unknown")
    return name if _on_the_hub(manifest, part) else Path(name).name


def _on_the_hub(manifest: Mapping[str, Any], part: str) -> bool:
    """Whether a name looks like `owner/name`, and is no path of this machine."""
    name = str((manifest.get(part) or {}).get("name") or "")
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
