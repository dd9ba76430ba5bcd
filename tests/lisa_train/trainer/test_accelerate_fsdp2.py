"""LISA in a Trainer whose model accelerate splits (fsdp): as one process, and taken up again.

Accelerate splits on accelerators only; `helpers_accelerate` tells it that a CPU is one.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_accelerate import fsdp2_on_a_cpu
from helpers_processes import ranks
from helpers_recording import arguments, examples, llama
from transformers import Trainer

import lisa_analysis as la
import lisa_train as lt

BATCH, STEPS, SAVED = 6, 6, 3  # checkpoints in the middle of an interval of two steps
# name -> settings of LISA, of Trainer, kind of checkpoint
CASES = {
    "reset": ({}, {}, "SHARDED_STATE_DICT"),
    "keep, whole": (
        {"optimizer_state": "keep", "always_active": ("norm",), "embed_probability": 0.5}, {},
        "FULL_STATE_DICT",
    ),
    "offload, accumulated": (
        {"optimizer_state": "offload", "warmup_steps": 2}, {"gradient_accumulation_steps": 2},
        "SHARDED_STATE_DICT",
    ),
    "learned, recomputed": (
        {"sampling": "balanced", "learn": lt.LearnConfig(metric="grad_rms", start_after=1)},
        {"gradient_checkpointing": True},
        "SHARDED_STATE_DICT",
    ),
    "fp32_active": (
        {"precision": "fp32_active", "optimizer_state": "keep"}, {}, "SHARDED_STATE_DICT",
    ),
    "bf16": ({}, {"bf16": True}, "SHARDED_STATE_DICT"),
}  # fmt: skip


def train(name, folder, world, *, split, checkpoint=None, record=None, tail="out"):
    settings, changes, kind = CASES[name]
    model = llama()
    if settings.get("precision") == "fp32_active":
        model = model.to(torch.bfloat16)
    fsdp = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}} if split else {}
    args = arguments(
        folder / tail, per_device_train_batch_size=BATCH // world, max_steps=STEPS,
        max_grad_norm=0.5, adam_epsilon=1e-3, save_strategy="steps" if split else "no",
        save_steps=SAVED, **changes, **fsdp,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=examples(96))
    assert trainer.is_fsdp_enabled == split
    lisa = lt.LisaConfig(
        **{"activated_layers": 1, "interval_steps": 2, "sampling": "cyclic", **settings}
    )
    attached = lt.attach(trainer, lisa=lisa, record=record)
    drawn = []
    attached.engine_callback.on_draw.append(lambda draw: drawn.append((draw.layers, draw.groups)))
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


def recording(folder):
    return lt.RecordConfig(str(folder / "run"), every=1, probe_every=2)


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
    return tensor.detach().clone() if torch.is_tensor(tensor) else torch.tensor(tensor)


def process(rank, folder):
    folder, world = Path(folder), dist.get_world_size()
    with fsdp2_on_a_cpu():
        for name in CASES:
            record = recording(folder) if name == "reset" else None
            done = train(name, folder / name, world, split=True, record=record)
            checkpoint = folder / name / "out" / f"checkpoint-{SAVED}"
            again = train(name, folder / name, world, split=True, checkpoint=checkpoint, tail="2")
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate")
    ranks(process, folder)
    return folder


HALF = {"fp32_active", "bf16"}  # roundings to bf16 that fall otherwise


def near(found, alone, begun, half):
    assert found["drawn"] == alone["drawn"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-3 if half else 2e-5)
    if half:
        ends = [joined(weights) for weights in (found["model"], alone["model"], begun)]
        assert (ends[0] - ends[1]).norm() <= 0.1 * (ends[1] - ends[2]).norm()
        return
    for key, value in alone["model"].items():
        torch.testing.assert_close(found["model"][key], value, rtol=2e-5, atol=2e-6)


def joined(weights):
    return torch.cat([weights[key].float().reshape(-1) for key in sorted(weights)])


def begun(name):
    model = llama()
    return (model.to(torch.bfloat16) if name == "fp32_active" else model).state_dict()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(folder, name, tmp_path):
    first, second = (torch.load(folder / f"{name}-{rank}.pt")["done"] for rank in range(2))
    assert first["drawn"] == second["drawn"]
    assert len({layers for layers, _ in first["drawn"]}) > 1
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    near(first, train(name, tmp_path, 1, split=False), begun(name), name in HALF)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_taken_up_to_the_bit(folder, name):
    for rank in range(2):
        found = torch.load(folder / f"{name}-{rank}.pt")
        done, again = found["done"], found["again"]
        assert again["losses"] == done["losses"]
        assert again["drawn"] == done["drawn"][-len(again["drawn"]) :]
        assert again["state"].keys() == done["state"].keys()
        for part in ("state", "model"):
            for key, value in done[part].items():
                assert torch.equal(again[part][key], value), key


def test_layers_that_rest_have_no_state(folder):
    state = torch.load(folder / "reset-0.pt")["again"]["state"]
    assert len({name.split(".")[2] for name in state if ".layers." in name}) == 1


OTHERS = ("reset", "keep, whole", "fp32_active")


def test_another_number_of_processes_takes_up_a_checkpoint(folder):
    ranks(others, folder, OTHERS, world=3)
    for name in OTHERS:
        done = torch.load(folder / f"{name}-0.pt")["done"]
        found = [torch.load(folder / f"{name}-of-3-{rank}.pt") for rank in range(3)]
        for key, value in found[0]["model"].items():
            assert all(torch.equal(value, each["model"][key]) for each in found), key
        done["drawn"] = done["drawn"][-len(found[0]["drawn"]) :]
        near(found[0], done, begun(name), name in HALF)


def test_such_a_run_is_recorded(folder, tmp_path):
    train("reset", tmp_path, 1, split=False, record=recording(tmp_path))
    columns = ("grad_norm", "update_norm", "weight_norm", "probe_grad_norm")
    runs = [la.load(path / "run") for path in (folder, tmp_path)]
    assert [run.status for run in runs] == ["finished", "finished"]
    found, one = (
        run.metrics().merge(run.parameters[["param_id", "name"]]).set_index(["step", "name"])
        for run in runs
    )
    found = found.reindex(one.index)
    assert found["probe_grad_norm"].notna().sum() > 3 * 9  # of layers that rest, too
    for column in columns:
        assert one[column].notna().any()
        np.testing.assert_allclose(found[column], one[column], rtol=1e-4, atol=1e-9)
