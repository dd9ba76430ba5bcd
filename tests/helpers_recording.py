"""Tiny models, a trainer that witnesses itself in float64, and the comparison with a recording.

The witness shares no code with the recorder: it overrides Trainer's own methods and keeps dense
float64 copies.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.run import Run

VOCABULARY = 48


def llama(tied: bool = False, layers: int = 3, **changes: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": tied, "initializer_range": 0.1, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
            num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


def examples(n: int = 64, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        mask[length - i % 4 :] = 0
        labels = torch.where(mask == 1, ids, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**settings, **changes})


class Witness(Trainer):
    """Keeps, for every optimizer step, dense float64 copies of what the recorder measures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
        self.losses: dict[int, float] = {}
        self.tokens: dict[int, int] = {0: 0}
        self.micro: list[dict[str, torch.Tensor]] = []
        self.add_callback(_AfterStep(self))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum())
        previous = {n: p.grad.double() for n, p in self._named() if p.grad is not None}
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self.tokens[step] = self.tokens.get(step, self.tokens.get(step - 1, 0)) + tokens
        self.losses[step] = self.losses.get(step, 0.0) + float(loss)
        gradients = {n: p.grad.double().clone() for n, p in self._named() if p.grad is not None}
        if step not in self.seen:
            self.seen[step], self.micro = {}, []
        self.micro.append({n: g - previous.get(n, 0) for n, g in gradients.items()})
        if self.accelerator.sync_gradients:
            self.seen[step] = {
                "gradient": gradients,
                "before": {n: p.detach().double().clone() for n, p in self._named()},
            }
        return loss

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.named_parameters())


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: Witness) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = {n: p.detach().double().clone() for n, p in self.trainer._named()}
        self.trainer.seen[state.global_step + 1]["after"] = after


def compare(run_dir: Path, trainer: Witness, *, rtol: float = 1e-5) -> Run:
    """Hold every recorded number of every step against the witness."""
    run = load(run_dir)
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    metrics = run.metrics()
    assert not metrics.duplicated(["step", "param_id"]).any()
    training = metrics[metrics["grad_norm"].notna()]
    assert sorted(training["step"].unique()) == sorted(trainer.seen)
    for step, rows in training.groupby("step"):
        seen = trainer.seen[step]
        assert {names[i] for i in rows["param_id"]} == set(seen["gradient"])
        for row in rows.itertuples():
            name = names[row.param_id]
            gradient, update = seen["gradient"][name], seen["after"][name] - seen["before"][name]
            expected = {
                "weight_norm": seen["after"][name].norm(),
                "grad_norm": gradient.norm(),
                "grad_norm_l1": gradient.abs().sum(),
                "update_norm": update.norm(),
            }
            for column, value in expected.items():
                assert np.isclose(getattr(row, column), float(value), rtol=rtol, atol=0), (
                    step, name, column, getattr(row, column), float(value),
                )  # fmt: skip
            # A sum of terms of both signs: 1e-5 of what would be there without cancellation.
            assert np.isclose(
                row.descent,
                -float((gradient * update).sum()),
                rtol=rtol,
                atol=rtol * float((gradient * update).abs().sum()),
            ), (step, name, "descent")
    return run
