"""A small LISA in a Trainer whose model accelerate splits (FSDP2), on GPUs or on a CPU.

It splits on accelerators only; `fsdp2_on_a_cpu` tells it that a CPU is one.
"""

import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType
from helpers_recording import arguments, examples, llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import lisa_train as lt

BATCH, STEPS, SAVED = 6, 5, 3  # a checkpoint in the middle of an interval of two steps
# name -> settings of LISA (None: without it), of Trainer, kind of checkpoint
CASES = {
    "reset": ({}, {}, "SHARDED_STATE_DICT"),
    "keep, whole, accumulated": (
        {"optimizer_state": "keep", "always_active": ("norm",), "embed_probability": 0.5},
        {"gradient_accumulation_steps": 2},
        "FULL_STATE_DICT",
    ),
    "offload, learned, recomputed": (
        {
            "optimizer_state": "offload", "sampling": "balanced",
            "learn": lt.LearnConfig(metric="probe", start_after=1, probe_every=1),
        },
        {"gradient_checkpointing": True},
        "SHARDED_STATE_DICT",
    ),
    "fp32_active": (
        {"precision": "fp32_active", "optimizer_state": "keep"}, {}, "SHARDED_STATE_DICT",
    ),
    "bf16": ({}, {"bf16": True}, "SHARDED_STATE_DICT"),
    "lora": (None, {}, "SHARDED_STATE_DICT"),
    "full": (None, {}, "SHARDED_STATE_DICT"),
    "offload, warm-up": (
        {"optimizer_state": "offload", "warmup_steps": 2}, {}, "SHARDED_STATE_DICT",
    ),
}  # fmt: skip
SLOW = ("full", "offload, warm-up")  # each of them is, in parts, another case too


@contextmanager
def fsdp2_on_a_cpu():
    """Have accelerate split models in processes without accelerators, by its own code.

    All that is changed is its decision, which `AcceleratorState` makes by the kind of device.
    """
    original = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(state.AcceleratorState, "__init__", init):
        yield


def train(name, folder, world, *, split, device="cpu", checkpoint=None, record=None, tail="out"):
    settings, changes, kind = CASES[name]
    model = begin(name)
    fsdp = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}} if split else {}
    args = arguments(
        folder / tail, per_device_train_batch_size=BATCH // world, max_steps=STEPS,
        max_grad_norm=0.5, adam_epsilon=1e-3, use_cpu=device == "cpu", **changes, **fsdp,
    )  # fmt: skip
    saves = [SaveOnce()] if split and checkpoint is None else None
    trainer = Trainer(model, args, train_dataset=examples(96), callbacks=saves)
    assert trainer.is_fsdp_enabled == split
    lisa = None if settings is None else lt.LisaConfig(
        **{"activated_layers": 1, "interval_steps": 2, "sampling": "cyclic", **settings}
    )  # fmt: skip
    attached = lt.attach(trainer, lisa=lisa, record=record)
    drawn = []
    if (engine := attached.engine_callback) is not None:
        engine.on_draw.append(lambda draw: drawn.append((draw.layers, draw.groups)))
    with warnings.catch_warnings():
        if checkpoint is not None:
            warnings.simplefilter("ignore")  # that the number of processes is another
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return {
        "drawn": drawn,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "model": {key: whole(value) for key, value in trainer.model.state_dict().items()},
        "state": states(trainer),
    }  # fmt: skip


class SaveOnce(TrainerCallback):
    """Save after `SAVED` steps, not at the end as well, which takes as long as training does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == SAVED


def begin(name):
    """The model of a case before training."""
    model = llama()
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return model.to(torch.bfloat16) if name == "fp32_active" else model


RECORDED = ("reset", "full", "lora")


def recording(folder, name):
    """Settings of the recorder, for the cases that are recorded."""
    if name not in RECORDED:
        return None
    return lt.RecordConfig(str(folder / f"run-{name}"), every=1, probe_every=2)


def states(trainer):
    """The optimizer's state by name, whole."""
    optimizer = trainer.optimizer
    return {
        f"{name}.{part}": whole(value)
        for name, p in trainer.model.named_parameters()
        for part, value in optimizer.state.get(p, {}).items()
    }


def whole(tensor):
    """A copy of a tensor, put together from its pieces."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().clone() if torch.is_tensor(tensor) else torch.tensor(tensor)


def process(rank, folder, names=tuple(CASES), device="cpu"):
    """Train every case, and take it up from its checkpoint; some are recorded."""
    folder, world = Path(folder), dist.get_world_size()
    with fsdp2_on_a_cpu() if device == "cpu" else nullcontext():
        for name in names:
            own = {"world": world, "split": True, "device": device}
            done = train(name, folder / name, record=recording(folder, name), **own)
            checkpoint = folder / name / "out" / f"checkpoint-{SAVED}"
            again = train(name, folder / name, checkpoint=checkpoint, tail="2", **own)
            torch.save({"done": done, "again": again}, folder / f"{name}-{rank}.pt")


def others(rank, folder, names):
    """As many processes as there are now take up what two began."""
    folder = Path(folder)
    with fsdp2_on_a_cpu():
        for name in names:
            checkpoint = folder / name / "out" / f"checkpoint-{SAVED}"
            world = dist.get_world_size()
            again = train(name, folder / name, world, split=True, checkpoint=checkpoint, tail="3")
            torch.save(again, folder / f"{name}-of-{world}-{rank}.pt")


HALF = {"fp32_active", "bf16"}  # roundings to bf16 that fall otherwise


def near(found, alone, name, tolerance=2e-5):
    """Hold a training against another one of the same case."""
    half, begun = name in HALF, begin(name).state_dict()
    assert found["drawn"] == alone["drawn"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-3 if half else tolerance)
    if half:
        ends = [joined(weights) for weights in (found["model"], alone["model"], begun)]
        assert (ends[0] - ends[1]).norm() <= 0.1 * (ends[1] - ends[2]).norm()
        return
    for key, value in alone["model"].items():
        torch.testing.assert_close(found["model"][key], value, rtol=tolerance, atol=tolerance / 10)


def joined(weights):
    return torch.cat([weights[key].float().reshape(-1) for key in sorted(weights)])


def taken_up_to_the_bit(found):
    """Hold what `process` left of a run that was taken up against the one that was not left."""
    done, again = found["done"], found["again"]
    assert again["losses"] == done["losses"]
    assert again["drawn"] == done["drawn"][-len(again["drawn"]) :]
    assert again["state"].keys() == done["state"].keys()
    for part in ("state", "model"):
        for key, value in done[part].items():
            assert torch.equal(again[part][key], value), key
