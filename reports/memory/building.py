"""A model with random weights in training under a setting: what is measured, on any device."""

import time
from dataclasses import replace
from typing import Any

import torch
from transformers.initialization import no_init_weights

import lisa_train as lt
from lisa_train.estimate.setting import Setting
from lisa_train.methods.lisa.samplers import make_sampler, resolve
from lisa_train.optim.eight_bit import set_eight_bit_states


class Training:
    """A model in training under a setting, on `device`."""

    def __init__(self, config: Any, setting: Setting, device: str) -> None:
        import transformers

        torch.manual_seed(0)
        self.setting, self.device = setting, torch.device(device)
        cls = getattr(transformers, config.architectures[0])
        with self.device, no_init_weights():
            self.model: Any = cls._from_config(
                config, dtype=getattr(torch, setting.dtype),
                attn_implementation=setting.attn_implementation,
            ).train()  # fmt: skip
        self.model.tie_weights()  # which belongs to what was skipped
        fill(self.model)
        if setting.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if setting.chunked_loss:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(self.model, outputs=("log_probs", "entropy", "is_top1"))
        if setting.method == "lora":
            self.model = _with_adapters(self.model, setting)
        self.engine: lt.Lisa | None = None
        if setting.method == "lisa" and setting.active_layers == ():
            groups = lt.find_layers(self.model).groups
            wanted = {name for group in ("embed", "head", "norm") for name in groups[group]}
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in wanted)
        self.optimizer = _optimizer(self.model, setting)
        if setting.eight_bit_states is not None:
            layer_map = lt.find_layers(self.model)
            set_eight_bit_states(self.optimizer, self.model, layer_map, setting.eight_bit_states)
        if setting.method == "lisa" and setting.active_layers is None:
            depth = len(lt.find_layers(self.model))
            self.engine = lt.Lisa(self.model, self.optimizer, typical(setting.lisa, depth))
        self.inside = lt.StepInBackward(self.optimizer) if setting.step_in_backward else None
        self.optimizer_seconds = 0.0
        shape = (setting.batch_size, setting.sequence_length)
        ids = torch.randint(3, config.vocab_size, shape, device=self.device)
        self.batch = {"input_ids": ids, "labels": ids, "use_cache": False}
        if setting.chunked_loss:
            self.batch["fused_lm_head"] = True

    @property
    def active_layers(self) -> tuple[int, ...] | None:
        """LISA's layers of the first interval."""
        return self.engine.active_layers if self.engine else self.setting.active_layers

    def loss(self) -> torch.Tensor:
        """Run the forward pass."""
        if self.engine is not None:
            self.engine.begin_step(0)  # the first interval, however many steps
        return self.model(**self.batch).loss

    def step(self) -> None:
        """Train one step."""
        self.loss().backward()
        begin = self.clock()
        self.optimizer.step()
        self.optimizer_seconds = self.clock() - begin
        self.optimizer.zero_grad()

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def typical(lisa: lt.LisaConfig, depth: int) -> lt.LisaConfig:
    """Let two layers be those at a third and at two thirds of the depth, about their mean places.

    Where backward ends, and with it memory and time without the embeddings, hangs on the lower one.
    """
    wanted = (depth // 3, 2 * depth // 3)
    if lisa.activated_layers != 2 or depth < 3:
        return lisa
    pi = resolve(None, depth, 2)
    seeds = (s for s in range(100_000) if make_sampler("uniform", pi, 2, s).draw(0) == wanted)
    return replace(lisa, seed=next(seeds))


def fill(model: torch.nn.Module) -> None:
    """Random weights, quickly: a million normal numbers, over and over; biases are zero."""
    block = torch.randn(1 << 20) * 0.02
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if name.endswith("bias"):
            flat.zero_()
        elif parameter.ndim > 1:
            whole = len(flat) - len(flat) % len(block)
            piece = block.to(flat)
            flat[:whole].view(-1, len(block)).copy_(piece)
            flat[whole:].copy_(piece[: len(flat) - whole])


def _with_adapters(model: Any, setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    from lisa_train.methods.lora import LORA_DEFAULTS

    return get_peft_model(model, LoraConfig(**{**LORA_DEFAULTS, **setting.lora}))


def _optimizer(model: Any, setting: Setting) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if setting.optim == "adamw_torch_fused":
        return torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    if setting.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=1e-5)
    import bitsandbytes as bnb

    # What Trainer does: embeddings in 32 bits, unless they are chosen.
    optimizer = bnb.optim.AdamW(
        parameters, lr=1e-5, optim_bits=8, is_paged=setting.optim.startswith("paged")
    )
    if setting.eight_bit_states is None:
        manager = bnb.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
