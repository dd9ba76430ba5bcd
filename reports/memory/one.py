"""One case on one device: builds the model with random weights, trains a few steps, measures.

Started by measure.py in a process of its own, so that running out of memory ends this case alone.
Prints one JSON object: of bytes, or with --timed of times.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from arithmetic import step_flops
from building import Training
from cases import cases
from resident import Resident
from shapes import SHAPES

from lisa_train.estimate.memory import estimate
from lisa_train.estimate.setting import Setting
from lisa_train.trainer.trl_head import sliced_head_gradient

WARM_UP = 3


def stored(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of storages, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in found.items() if pointer)


def count(training: Training) -> dict[str, int]:
    """Bytes of weights, gradients, state and saved activations, from the tensors alone."""
    model = training.model
    weights = [*model.parameters(), *model.buffers()]
    training.step()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.loss()
    bytes_saved = stored(saved.values())
    saved.clear()
    loss.backward()
    gradients = stored(p.grad for p in model.parameters() if p.grad is not None)
    state = stored(
        value
        for entry in training.optimizer.state.values()
        for key, value in entry.items()
        if torch.is_tensor(value) and key not in ("step", "qmap1", "qmap2")
    )
    training.optimizer.step()
    training.optimizer.zero_grad()
    return {
        "weights": stored(weights), "gradients": gradients, "optimizer": state,
        "saved": bytes_saved,
    }  # fmt: skip


def on_cuda(training: Training) -> dict[str, Any]:
    """Peak memory of warm steps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        training.step()
    torch.cuda.synchronize()
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def times(training: Training, steps: int) -> dict[str, float]:
    """Medians over warm steps: of the whole step, of the optimizer's part, of what is skipped."""
    for _ in range(WARM_UP if training.device.type == "cuda" else 1):
        training.step()
    seconds, of_optimizer = [], []
    for _ in range(steps):
        start = training.clock()
        training.step()
        seconds.append(training.clock() - start)
        of_optimizer.append(training.optimizer_seconds)
    median = statistics.median(seconds)
    tokens = training.setting.batch_size * training.setting.sequence_length
    found = {
        "timed_steps": steps,
        "step_seconds": median,
        "optimizer_seconds": statistics.median(of_optimizer),
        "tokens_per_second": tokens / median,
    }
    if training.setting.method == "lisa":
        found["skipped_seconds"] = skipped_seconds(training)
    return found


def skipped_seconds(training: Training, repeats: int = 3) -> float:
    """Time of the weight gradients that this training does not compute, were they computed alone.

    One product per frozen linear map, of the shapes that autograd would take.
    """
    tokens = training.setting.batch_size * training.setting.sequence_length
    shapes = Counter(
        (module.out_features, module.in_features)
        for module in training.model.modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    )
    total = 0.0
    kind = getattr(torch, training.setting.dtype)
    for (rows, columns), count in shapes.items():
        gradient = torch.randn(tokens, rows, device=training.device).to(kind)
        entered = torch.randn(tokens, columns, device=training.device).to(kind)
        seconds = []
        for _ in range(repeats + 1):
            start = training.clock()
            torch.mm(gradient.t(), entered)
            seconds.append(training.clock() - start)
        total += count * statistics.median(seconds[1:])
    return total


def on_cpu(training: Training) -> dict[str, Any]:
    """Peak of a step by the allocator's record, over what rests between steps."""
    resting = stored(
        [
            *training.model.parameters(),
            *training.model.buffers(),
            *(v for s in training.optimizer.state.values() for v in s.values() if _dense(v)),
        ]
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        training.step()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return {"peak_allocated": resting + top}


def _dense(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def predict(config: Any, setting: Setting, layers: tuple[int, ...] | None) -> dict[str, int]:
    """Return the estimate for the layers that trained."""
    if setting.method == "lisa":
        setting = replace(setting, active_layers=layers)
    found = estimate(config, setting)
    device = found.fullest
    return {
        "weights": device.weights, "gradients": device.gradients, "optimizer": device.optimizer,
        "activations": device.activations, "logits": device.logits, "total": device.peak,
        "needs": found.needs(), "saved": _saved(config, setting), "paged_or_host": found.host,
    }  # fmt: skip


def _saved(config: Any, setting: Setting) -> int:
    """Bytes that the estimate says are saved for backward, those of head and loss included."""
    from lisa_train.estimate.patterns import lisa_pattern, plain_pattern
    from lisa_train.estimate.stage import Stage
    from lisa_train.estimate.step import record_step

    stage = Stage(config, setting)
    lisa = setting.method == "lisa"
    layers = setting.active_layers or ()
    pattern = lisa_pattern(stage, setting, layers) if lisa else plain_pattern(stage)
    return record_step(stage, setting, pattern, backward=False).saved()


def measured(
    config: Any, setting: Setting, device: str, timed_steps: int
) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """Bytes of a training under the setting, or its times, and LISA's layers in it."""
    on_gpu = device.startswith("cuda")
    resident = None if on_gpu else Resident()
    training = Training(config, setting, device)
    with sliced_head_gradient():  # as in attach()
        if timed_steps:
            return times(training, timed_steps), training.active_layers
        found = count(training)
        if resident is None:
            return found | on_cuda(training), training.active_layers
        resident.restart()
        found |= on_cpu(training)
    return found | {"peak_resident": resident.peak()}, training.active_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--timed", type=int, default=0, help="steps whose time is taken; no bytes")
    parser.add_argument("--estimate-only", action="store_true")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    named = {case.name: case for case in cases(arguments.batch_size, arguments.length)}
    setting = named[arguments.case].setting
    result: dict[str, Any] = {"shape": arguments.shape, "case": arguments.case, "status": "ok"}
    layers = setting.active_layers
    if not arguments.estimate_only:
        try:
            result["measured"], layers = measured(
                config, setting, arguments.device, arguments.timed
            )
        except torch.cuda.OutOfMemoryError as error:
            result["status"] = "out of memory"
            result["message"] = str(error).splitlines()[0]
    if setting.method == "lisa" and layers is None:
        layers = tuple(range(setting.lisa.activated_layers))
    result["active_layers"] = list(layers) if layers is not None else None
    result["estimate"] = predict(config, setting, layers)
    result["flops"] = step_flops(config, setting, layers)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
