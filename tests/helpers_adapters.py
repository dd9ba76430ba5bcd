"""Adapted models of a few thousand weights, and what PEFT itself says that their weights are."""

import copy
from pathlib import Path
from typing import Any

import torch
from helpers_recording import examples, llama

import lisa_train as lt

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base: Any = None, **changes: Any) -> Any:
    """A Llama with LoRA."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS}
    torch.manual_seed(3)
    return get_peft_model(base or llama(layers=2), LoraConfig(**{**settings, **changes}))


@torch.no_grad()
def merged_weights(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What PEFT's own merge makes of every adapted weight, in float64, by the name of B."""
    model = copy.deepcopy(model).double()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for module in model.modules():
        if not hasattr(module, "get_delta_weight") or hasattr(module, "parameter_name"):
            continue
        seconds = module.lora_B if adapter in module.lora_B else module.lora_embedding_B
        b = getattr(seconds[adapter], "weight", seconds[adapter])
        module.merge(safe_merge=True, adapter_names=[adapter])
        found[names[id(b)]] = module.get_base_layer().weight.detach().clone()
    return found


def batches(n: int) -> list[dict[str, torch.Tensor]]:
    rows = examples(2 * n)
    return [
        {k: torch.stack([rows[2 * i][k], rows[2 * i + 1][k]]) for k in rows[0]} for i in range(n)
    ]


def train(
    model: Any, folder: Path, *, steps: int = 3, after: Any = None, batch: Any = None, **record: Any
) -> Path:
    """A plain loop of a few large steps, recorded; `after(step)` runs behind every one."""
    extra = batch or {}
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    config = lt.RecordConfig(str(folder), every=1, **record)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step, batch in enumerate(batches(steps), 1):
            loss = model(**batch, **extra).loss
            loss.backward()
            recorder.before_step(step)
            optimizer.step()
            if after is not None:
                after(step)
            recorder.after_step(step, loss=loss)
            optimizer.zero_grad()
    return folder
