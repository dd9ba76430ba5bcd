"""What the adapters of a run started with: kept beside the run, and taken up again on a resume.

PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, orthogonal and random initialisation start with a product BA
that is not zero (most of them take it out of W), and so does training that goes on from an
adapter. What such a run changed is BA − B₀A₀, at any later step and in any later segment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import ADAPTER_START
from lisa_analysis.rundir.opening import load
from lisa_train.measure.adapters.lora_pairs import Factors, LoraPair
from lisa_train.measure.adapters.lora_products import whole_factors
from lisa_train.measure.buffers import to_host
from lisa_train.measure.disk.run_file import one_sentence
from lisa_train.measure.disk.storage import replace_file
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.processes import Processes

# The entry of run.json's `recording`, and what it says when no adapter has a file to start from.
_ENTRY, _ZERO = "adapter_start", "zero"


def begin(
    pairs: Sequence[LoraPair], processes: Processes, writer: RunWriter | SilentWriter
) -> list[str]:
    """Note that the run starts now. Returns what has to be said about it."""
    if not pairs:
        return []
    whole = whole_factors(pairs, processes)
    with torch.no_grad():
        for pair in pairs:
            pair.start, pair.start_known = None, True
        starts = [pair.now(whole) for pair in pairs]
        squares = [pair.delta_square(now) for pair, now in zip(pairs, starts, strict=True)]
        # The one moment that waits for the device, before the first step.
        products = [line["square"] for line in to_host([{"square": s} for s in squares])]
        for pair, now, product in zip(pairs, starts, products, strict=True):
            if product != 0 or pair.magnitude is not None:
                pair.start = _copied(now, product=product != 0)
    return _write(pairs, writer) if isinstance(writer, RunWriter) else []


def take_up(
    pairs: Sequence[LoraPair], processes: Processes, writer: RunWriter | SilentWriter
) -> list[str]:
    """Find the start of a run that is continued. Returns what has to be said about it."""
    if not pairs:
        return []
    found: dict[str, torch.Tensor] | str = ""
    if isinstance(writer, RunWriter):
        found = _read(pairs, writer)
    found = processes.from_first(found)
    if isinstance(found, str):
        for pair in pairs:
            pair.start_known = False
        return [found] if found else []
    for pair in pairs:
        pair.start = _start(pair, found)
        pair.start_known = pair.magnitude is None or pair.start is not None
    if all(pair.start_known for pair in pairs):
        return []
    return [
        "delta_norm of adapters with DoRA is not measured: the run was begun by a version that "
        "did not keep what they started with."
    ]


def _copied(now: Factors, *, product: bool) -> Factors:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().clone()

    a, b, diagonal = (now.a, now.b, now.diagonal) if product else (None, None, None)
    scale = now.scale.clone() if torch.is_tensor(now.scale) else now.scale
    return Factors(copy(a), copy(b), scale, copy(diagonal), copy(now.magnitude))


def _write(pairs: Sequence[LoraPair], writer: RunWriter) -> list[str]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for pair in pairs:
        if pair.start is not None:
            for part, value in vars(pair.start).items():
                if value is not None:
                    tensor = torch.as_tensor(value, dtype=None if part != "scale" else torch.double)
                    tensors[f"{pair.name_b}/{part}"] = tensor.detach().cpu().contiguous()
    path = writer.path / ADAPTER_START
    try:
        path.unlink(missing_ok=True)  # of a segment that began again at step 0
        if tensors:
            replace_file(path, lambda temporary: save_file(tensors, str(temporary)))
        entry = {_ENTRY: ADAPTER_START if tensors else _ZERO}
        writer.update_manifest(recording=writer.manifest.get("recording", {}) | entry)
    except (OSError, LisaError, SafetensorError) as error:
        return [
            f"{path} cannot be written ({one_sentence(error)}): a resumed run will not know what "
            "its adapters started with, and record no delta_norm."
        ]
    return []


def _read(pairs: Sequence[LoraPair], writer: RunWriter) -> dict[str, torch.Tensor] | str:
    """Return the tensors of the start, none where all products were zero, or what is missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    recording = writer.manifest.get("recording")
    entry = recording.get(_ENTRY) if isinstance(recording, Mapping) else None
    path = writer.path / ADAPTER_START
    try:
        if entry == _ZERO or (entry is None and _recorded_zero(pairs, writer)):
            return {}
        return dict(load_file(str(path)))
    except (OSError, LisaError, SafetensorError) as error:
        reason = "is missing"
        if path.exists():
            reason = f"cannot be read ({one_sentence(error)})"
        return (
            f"delta_norm of LoRA is not measured in this segment: {path}, which holds what the "
            f"adapters started with, {reason}; put it back and resume again."
        )


def _recorded_zero(pairs: Sequence[LoraPair], writer: RunWriter) -> bool:
    """Whether a run of an earlier version, which recorded ‖sBA‖ itself, began with zero."""
    run = load(writer.path)
    numbers = dict(zip(run.parameters["name"], run.parameters["param_id"], strict=True))
    rows = run.metrics(["delta_norm"], steps=[0]).set_index("param_id")["delta_norm"]
    return all(rows.get(numbers.get(pair.name_b)) == 0 for pair in pairs if pair.magnitude is None)


def _start(pair: LoraPair, tensors: Mapping[str, torch.Tensor]) -> Factors | None:
    parts: dict[str, Any] = {
        part: tensors[key].to(pair.b.device)
        for part in ("a", "b", "scale", "diagonal", "magnitude")
        if (key := f"{pair.name_b}/{part}") in tensors
    }
    if not parts:
        return None
    return Factors(**{"a": None, "b": None, **parts, "scale": float(parts["scale"])})
