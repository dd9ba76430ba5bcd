"""`method: probe`: the gradients of batches of a run's data, at the weights as they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of, real, whole
from lisa_train.methods import Method, register

if TYPE_CHECKING:
    import torch
    from torch import nn
    from trl import SFTTrainer

    from lisa_train.command.training import PreparedRun

Signal = Literal["auto", "exact", "sketch"]

# Settings of training, which a probe does not use.
_OF_TRAINING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "gradient_accumulation_steps", "max_grad_norm", "weight_decay", "optim", "step_in_backward",
    "eight_bit_states", "lr_multipliers", "per_device_eval_batch_size", "eval_steps", "save_steps",
    "save_total_limit", "resume_incomplete", "logging_steps", "report_to",
)  # fmt: skip
# Settings of `record` that a probe uses.
_RECORDED = ("run_dir", "select", "layers")


@dataclass(frozen=True)
class ProbeConfig:
    """How long a probe measures, and how it sums gradients.

    Parameters
    ----------
    batches
        Batches to measure, of each process; data that are used up end it earlier.
    until
        Stop before that when every layer's interval is this narrow: half its width over the
        score, both on the scale of gradients (0.1 is ± 10 %). None measures all batches.
    signal
        ``exact`` sums the gradients themselves, in one fp32 copy of the weights; ``sketch`` sums
        sketches of them; ``auto`` is exact where that takes at most half of the free memory.
    """

    batches: int = 32
    until: float | None = None
    signal: Signal = "auto"

    def __post_init__(self) -> None:
        whole("probe.batches", self.batches, " of at least 1", 1)
        if self.until is not None:
            words = "a number above 0 (0.1 is ± 10 %), or null to measure all batches"
            if not real("probe.until", self.until, words) > 0:
                raise ConfigError(f"probe.until is {self.until!r}, but must be {words}.")
        one_of("probe.signal", self.signal, get_args(Signal))


@register
class Probe(Method):
    """Measure the gradients of independent batches; train nothing, write no weights.

    Without `lora` settings the model is measured as it is; with them adapters are put on first,
    and their gradients are measured beside those of the weights below.
    """

    name = "probe"
    help = "trains nothing and measures the gradients of --probe.batches batches"
    sections = ("probe", "lora")
    makes_steps = False
    resumable = False
    refuses_float16 = (
        "small gradients vanish in fp16 where no loss scale holds them up; set dtype to float32 "
        "or bfloat16"
    )
    refuses_quantized = "quantized weights have no gradients; give an unquantized model"

    def check(self, config: Any) -> None:
        """Refuse what has no meaning without an update."""
        if config.fp16:
            raise ConfigError(
                "fp16 is true and method is probe: small gradients vanish in fp16 where no loss "
                "scale holds them up; set bf16 to true, or fp16 to false."
            )

    def check_estimate(self, setting: Any) -> None:
        """Refuse: an estimate counts the optimizer step that a probe does not make."""
        raise ConfigError(
            "the memory of a probe is not estimated: above its forward pass it holds the "
            "gradients of one layer, and with probe.signal exact one fp32 copy of the weights; "
            "choose another method for an estimate."
        )

    def peft_config(self, config: Any, task_type: str | None = None) -> Any:
        """Return the adapters that were asked for; None without `lora` settings."""
        from lisa_train.methods.lora import lora_config

        return lora_config(config.lora, task_type) if config.lora else None

    def remarks(self, model: "nn.Module", config: Any) -> list[str]:
        """Say which of the settings that were given are those of training, and have no effect."""
        given = [name for name in _changed(config) if name in _OF_TRAINING]
        given += [f"record.{name}" for name in _changed(config.record) if name not in _RECORDED]
        if not given:
            return []
        return [
            f"a probe makes no steps and does not use {', '.join(given)}; how much it measures is "
            f"probe.batches, {config.probe.batches}"
        ]

    def run(self, prepared: "PreparedRun") -> None:
        """Measure the first batches of an epoch, in the order that the seed gives."""
        from lisa_train.measure.probe.probing import probe
        from lisa_train.model.run_entries import joined
        from lisa_train.trainer.trl_head import sliced_head_gradient

        config, trainer = prepared.config, prepared.trainer
        data_seed = config.seed if config.data_seed is None else config.data_seed
        seeds = {"seed": config.seed, "data_seed": data_seed}
        # Batches of one size: a last one that is smaller has noise of its own.
        whole_batch = trainer.args.train_batch_size * trainer.args.world_size
        trainer.args.dataloader_drop_last = len(trainer.train_dataset) >= whole_batch
        trainer.model.train()  # as training sees it: with dropout, and activations recomputed
        with sliced_head_gradient():
            probe(
                trainer.model,
                trainer.get_train_dataloader(),
                prepared.run_dir,
                config.probe.batches,
                config.record,
                loss=_loss_of(trainer),
                until=config.probe.until,
                signal=config.probe.signal,
                seed=config.seed,
                manifest=joined({"seeds": seeds}, prepared.manifest),
                config_yaml=prepared.config_yaml,
                progress=config.progress_bar,
            )

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Say how much was measured."""
        tokens = f", {result['tokens']:,} tokens" if result.get("tokens") else ""
        return f"{result['batches']} batches measured{tokens}, mean loss {result['loss']:.4f}"


def _changed(config: Any) -> list[str]:
    """Names of the settings that are not as they come."""
    return [f.name for f in fields(config) if getattr(config, f.name) != f.default]


def _loss_of(trainer: "SFTTrainer") -> "Callable[[nn.Module, Any], torch.Tensor]":
    """Return the loss that the trainer would take, in the precision that it computes in."""

    def loss(model: "nn.Module", batch: Any) -> "torch.Tensor":
        # Trainer puts autocast around the forward pass when it prepares the model, to train.
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            value: torch.Tensor = trainer.compute_loss(model, dict(batch))
        return value

    return loss
