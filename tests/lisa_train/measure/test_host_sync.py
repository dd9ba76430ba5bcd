"""Nothing waits for an accelerator outside a flush: shown on a device that has no data to read.

`tests/gpu/test_recorder_gpu.py` asks CUDA itself. Here every step is made on torch's `meta`
device, where the recorder takes the route of accelerators, under a watch that refuses whatever
makes the host wait. The rows of a run on the CPU tell which numbers must have been measured.
"""

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from helpers_host_sync import DEVICE, HostSyncError, watched
from helpers_loops import CASES, Case, build, measured, train
from helpers_recording import arguments, examples
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.measure.step.step_measure import StepMeasure

# What a run may read of the device: at flushes, and at its begin what adapters start with.
READS = ("buffers.py", "adapters/start.py")


def same_numbers(run, expected, apart=()):
    for ours, theirs in zip(measured(run), measured(expected), strict=True):
        drop = [name for name in apart if name in ours]
        assert ours.drop(columns=drop).equals(theirs.drop(columns=drop))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "fused") for name, case in CASES.items() if not torch.is_tensor(case.rate)]
    + [("a learning rate that is a tensor", "for-loop")]
    + [
        (name, optimizer)
        for name in ("full", "LISA", "LoRA", "steps inside backward")
        for optimizer in ("foreach", "for-loop")
    ],
)
def test_a_plain_loop(tmp_path, monkeypatch, name, optimizer):
    case = CASES[name]
    expected = train(case, build(case, "cpu"), tmp_path / "cpu", optimizer)
    model = build(case, DEVICE)
    with watched(monkeypatch) as watch:
        run = train(case, model, tmp_path / "meta", optimizer)
    same_numbers(run, expected)
    assert watch.waits  # the flushes at begin and end
    assert all(any(name in wait for name in READS) for wait in watch.waits)


def test_only_offloaded_state_makes_the_engine_wait(tmp_path, monkeypatch):
    """That is what offloading is; the recorder beside it waits no more than ever."""
    case = Case(method="lisa", lisa={"optimizer_state": "offload"})
    model = build(case, DEVICE)
    with watched(monkeypatch, spared="policies.py") as watch:
        train(case, model, tmp_path, "fused", steps=10)
    waits = {wait.split("/")[-1].split(":")[0] for wait in watch.waits}
    assert waits == {"buffers.py", "policies.py"}


def index(x):
    return x.reshape(-1)[torch.zeros(1, dtype=torch.long)]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: float(x.sum()),
        lambda x: x.sum().cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x[x > 0],
        lambda x: torch.as_tensor(1.0).to(x),
        lambda x: torch.as_tensor(1.0, device=x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.from_numpy(np.zeros(2)).to(x.device),
        lambda x: x.copy_(torch.zeros(x.shape)),
        lambda x: torch.zeros(x.shape).copy_(x),
        index,
    ],
)
def test_what_waits_is_seen_in_the_recorder(tmp_path, monkeypatch, wait):
    """The watch is worth something only if a slip in the recorder's own code ends the run."""
    update = StepMeasure.update

    def slip(self, step, clip_coef):
        wait(self.active[0][1].detach())
        update(self, step, clip_coef)

    model = build(CASES["full"], DEVICE)
    monkeypatch.setattr(StepMeasure, "update", slip)
    with watched(monkeypatch), pytest.raises(HostSyncError):
        train(CASES["full"], model, tmp_path, "fused")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * 2.0 + torch.tensor(1.0),
        lambda x: torch.full((), 2.0, device=x.device) * x,
        lambda x: torch.zeros(x.shape).to(x.device, non_blocking=True),
        lambda x: x.fill_(1.0),
        lambda x: torch.arange(3, device=x.device),
    ],
)
def test_what_does_not_wait_is_let_through(monkeypatch, work):
    with watched(monkeypatch) as watch:
        work(torch.zeros(2, 3, device=DEVICE))
    assert watch.waits == []


def on_meta(monkeypatch, args):
    """Let Trainer and accelerate place model and batches on `meta`, as they do on a GPU."""
    assert args.device.type == "cpu"
    args.__dict__["_setup_devices"] = DEVICE
    monkeypatch.setitem(PartialState._shared_state, "device", DEVICE)
    return args


def train_with_trainer(monkeypatch, method, device, folder):
    inside = method == "inside backward"
    args = arguments(
        folder / "out", max_steps=5, logging_strategy="no", logging_nan_inf_filter=False,
        gradient_accumulation_steps=1 if inside else 2, max_grad_norm=0 if inside else 0.5,
    )  # fmt: skip
    if device == DEVICE:
        on_meta(monkeypatch, args)
    trainer = Trainer(
        model=build(CASES["LoRA" if method == "LoRA" else "full"], device),
        args=args,
        train_dataset=examples(),
    )
    if method == "loss scale":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    config = lt.RecordConfig(
        str(folder / "run"), every=1, grad_noise=not inside, probe_every=2, flush_seconds=1e9,
        on_record_error="raise",
    )  # fmt: skip
    lisa = lt.LisaConfig(1, 2) if method == "LISA" else None
    lt.attach(trainer, record=config, lisa=lisa, step_in_backward=inside)
    trainer.train()
    return load(folder / "run")


@pytest.mark.parametrize("method", ["full", "LISA", "LoRA", "inside backward", "loss scale"])
def test_a_trainer(tmp_path, monkeypatch, method):
    """Trainer itself waits here and there (for masks, say): only the recorder must not."""
    expected = train_with_trainer(monkeypatch, method, torch.device("cpu"), tmp_path / "cpu")
    with watched(monkeypatch, everyone=False) as watch:
        run = train_with_trainer(monkeypatch, method, DEVICE, tmp_path / "meta")
    # Whether a step was skipped is read at the flush, as true like every number of the device.
    apart = ("update_norm", "descent") if method == "loss scale" else ()
    same_numbers(run, expected, apart)
    # What lies beside its tensor: on a device the host's step counts do not.
    apart = ["time", "state_bytes"] if method == "LISA" else ["time"]
    assert run.events.drop(columns=apart).equals(expected.events.drop(columns=apart))
    assert any("trainer.py" in wait for wait in watch.waits)
    ours = [wait for wait in watch.waits if "lisa_train/" in wait and "tests/" not in wait]
    assert all(any(name in wait for name in READS) for wait in ours)
    assert run.scalars["tokens"].notna().all()
    # Nothing was flushed before the end, and still run.json knows the last step's numbers.
    assert run.manifest["result"].keys() == expected.manifest["result"].keys()
    assert {"loss", "tokens"} <= run.manifest["result"].keys()
