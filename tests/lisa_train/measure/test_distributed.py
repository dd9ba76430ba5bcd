"""Two processes (DDP, FSDP2) record what one does, with one collective per recorded step.

All runs of two processes are made by one launch of `helpers_distributed.py`, which also holds what
can only be seen from inside: counted collectives, gradients in memory, warnings on every process.
"""

import copy
import functools
import re
import shutil

import helpers_distributed as worker
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_processes import ranks
from helpers_recording import llama

from lisa_analysis.rundir.opening import load
from lisa_train.measure.buffers import to_host
from lisa_train.measure.processes import Processes

pytestmark = pytest.mark.processes

COLUMNS = ("weight_norm", "grad_norm", "grad_norm_l1", "update_norm", "descent", "opt_steps")
SCALARS = ("loss", "tokens", "grad_norm", "clip_coef", "learning_rate")


def cases(*names):
    """Parameters of a test, of which some are marked slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in worker.SLOW else []) for n in names]


class Launched:
    """Folders of the runs of two processes, by `/`; those that are slow are launched apart."""

    def __init__(self, make):
        self.make = make

    @functools.cached_property
    def ordinary(self):
        folder = self.make("two")
        worker.small().save_pretrained(folder / "base")
        worker.trainer(folder / "trainer-joined", 0, 1, lisa=worker.LISA, **worker.SAVING)
        ranks(worker.main, folder, [name for name in worker.SCENARIOS if name not in worker.SLOW])
        return folder

    @functools.cached_property
    def slow(self):
        folder = self.make("slow")
        worker.small().save_pretrained(folder / "base")
        ranks(worker.main, folder, worker.SLOW)
        return folder

    def __truediv__(self, name):
        return (self.slow if name in worker.SLOW else self.ordinary) / name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Launched(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the same runs of one process, and its weights before every step."""
    folder = tmp_path_factory.mktemp("one")
    worker.small().save_pretrained(folder / "base")
    weights = {}
    worker.plain(folder / "plain", 0, 1, grad_noise=True, keep=weights)
    return folder, weights


def rows_of(path):
    run = load(path)
    assert run.status == "finished"
    frame = run.metrics().merge(run.parameters[["param_id", "name"]], on="param_id")
    return run, frame.set_index(["step", "name"]).sort_index()


def assert_same(first, second, columns=COLUMNS, scalars=SCALARS, rtol=2e-5):
    """Hold the runs in two folders against each other, and return the first run's rows."""
    (run, a), (other, b) = rows_of(first), rows_of(second)
    assert list(a.index) == list(b.index)
    assert a["grad_norm"].notna().any()
    for column in columns:
        # A sum of terms of both signs: measured against what it is without cancellation.
        scale = a["grad_norm"] * a["update_norm"] if column == "descent" else 0
        assert a[column].notna().any(), column
        assert (a[column].isna() == b[column].isna()).all(), column
        known = a[column].notna()
        error = (a[column] - b[column]).abs()[known]
        bound = rtol * np.maximum(a[column].abs(), scale)[known]
        assert (error <= bound + 1e-12).all(), (column, (error / bound).max())
    for name in scalars:
        assert np.allclose(run.scalars[name].astype(float), other.scalars[name], rtol=rtol), name
    assert run.scalars["tokens"].tolist() == other.scalars["tokens"].tolist()
    return a


def at(weights):
    """The small model with these weights, in float64."""
    model = worker.small().double()
    model.load_state_dict(weights)
    return model


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- a plain loop


def test_processes_open_a_run_directory_once_and_refuse_it_together(two):
    """More is asserted in every process, see `refusals`; the documented form, in every test."""
    run = load(two / "refusals" / "run")
    assert run.status == "finished"
    assert run.manifest["segment"] == 1
    assert run.manifest["hardware"]["processes"] == 2
    assert run.scalars["step"].tolist() == [1, 2]
    assert not run.metrics().duplicated(["step", "param_id"]).any()


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_record_what_one_does(one, two, mode):
    folder, _ = one
    columns = (*COLUMNS, "delta_norm", "probe_grad_norm")
    rows = assert_same(folder / "plain", two / mode, columns)
    assert (load(two / mode).scalars["clip_coef"] < 1).all()
    assert rows["probe_grad_norm"].notna().sum() == 2 * 30  # also of the layer that is frozen


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_measuring_pass_is_that_of_the_whole_batch(one, two, mode):
    _, weights = one
    _, rows = rows_of(two / mode)
    for step in (2, 4):
        exact = gradients(at(weights[step + 1]), worker.batches(step + 1)[0])
        assert len(exact) == 30
        for name, gradient in exact.items():
            found = rows.loc[(step, name), "probe_grad_norm"]
            assert found == pytest.approx(float(gradient.norm()), rel=1e-4), name


def variance(samples):
    """Tr Σ of a list of gradients, tensor by tensor."""
    stacked = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    return {name: float(x.var(0, unbiased=True).sum()) for name, x in stacked.items()}


def test_gradient_noise_is_that_between_the_micro_batches_of_all_processes(one, two):
    folder, weights = one
    _, alone = rows_of(folder / "plain")
    _, shared = rows_of(two / "ddp")
    for step in (1, 2, 4):
        model = at(weights[step])
        whole = worker.batches(step)
        halves = [ids[rank::2] for ids in whole for rank in range(2)]
        for rows, parts in ((alone, whole), (shared, halves)):
            exact = variance([gradients(model, ids) for ids in parts])
            measured = rows.loc[step]["grad_noise"].dropna()
            assert len(measured) == 21  # what trains
            for name, value in measured.items():
                assert value == pytest.approx(exact[name], rel=1e-4), name


def test_gradient_noise_of_a_tensor_that_one_process_reached_twice_is_not_measured(two):
    run, rows = rows_of(two / "twice")
    known = rows.loc[1]["grad_noise"]
    assert known.index[known.isna()].tolist() == ["lm_head.weight"]
    assert rows["grad_norm"].loc[1].notna().all()
    assert run.non_finite().empty  # null, not NaN


def test_gradient_noise_of_sharded_weights_is_refused_in_words(two):
    run, rows = rows_of(two / "fsdp2")
    assert rows["grad_noise"].isna().all()
    [message] = run.events.loc[run.events["event"] == "warning", "message"]
    assert "grad_noise is not measured with sharded weights" in message


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_the_distance_from_the_base_checkpoint_adds_up(one, two, mode):
    _, weights = one
    _, rows = rows_of(two / mode)
    last = rows.loc[worker.STEPS]["delta_norm"]
    assert len(last) == 30
    for name, value in last.items():
        exact = float((weights[worker.STEPS + 1][name].double() - weights[1][name]).norm())
        assert value == pytest.approx(exact, rel=1e-4), name


# ---------------------------------------------------------------------- LoRA


@torch.no_grad()
def dense_products(model):
    """‖ΔW‖ since the start and ‖W + ΔW‖ by PEFT's own dense product, in float64, by B's name."""
    start = _products(worker.with_adapters(worker.small()))
    return {
        name: (float((delta - start[name][0]).norm()), float((weight + delta).norm()))
        for name, (delta, weight) in _products(model).items()
    }


@torch.no_grad()
def _products(model):
    model = copy.deepcopy(model).double()
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            linear = "default" in module.lora_B
            b = module.lora_B["default"].weight if linear else module.lora_embedding_B["default"]
            delta = module.get_delta_weight("default")
            found[names[id(b)]] = (delta, module.get_base_layer().weight)
    return found


@pytest.mark.parametrize("name", cases("adapters-fsdp2", "adapters-replicas"))
def test_products_of_sharded_adapters_are_exact(one, two, name):
    folder, _ = one
    steps = worker.STEPS if name == "adapters-fsdp2" else worker.STEPS // 2
    model = worker.adapters(folder / name, 0, 1, steps=steps)
    columns = (*COLUMNS, "delta_norm", "merged_norm", "probe_grad_norm")
    assert_same(folder / name, two / name, columns)
    _, rows = rows_of(two / name)
    shown = [0, 1, *range(worker.EVERY, steps + 1, worker.EVERY)]
    assert rows["delta_norm"].notna().groupby("step").sum().tolist() == [14] * len(shown)
    assert_products(rows.loc[steps], dense_products(model))


def test_adapters_that_are_not_sharded_beside_weights_that_are(two):
    model = worker.with_adapters(worker.small())
    _, rows = rows_of(two / "adapters-beside")
    assert_products(rows.loc[0], dense_products(model))
    exact = gradients(model.double().requires_grad_(), worker.batches(0)[0])
    probed = rows.loc[1]["probe_grad_norm"].dropna()
    assert set(probed.index) == set(exact)
    for name, value in probed.items():
        assert value == pytest.approx(float(exact[name].norm()), rel=1e-4), name


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_what_adapters_started_with_is_known_to_all_processes_after_a_resume(two, name):
    _, rows = rows_of(two / "adapters-resumed" / name)
    assert rows.loc[0]["delta_norm"].max() == 0
    expected = dense_products(worker.moved(worker.with_adapters(worker.small())))
    assert_products(rows.loc[2], expected)


def assert_products(rows, expected):
    assert len(expected) == 14
    assert set(rows.index[rows["delta_norm"].notna()]) == set(expected)
    for name, (delta, merged) in expected.items():
        assert rows.loc[name, "delta_norm"] == pytest.approx(delta, rel=1e-4), name
        assert rows.loc[name, "merged_norm"] == pytest.approx(merged, rel=1e-4), name


# ---------------------------------------------------------------------- measuring passes


def routed_norms(passes):
    """Norms of the mean gradient of the passes, by name, in float64."""
    model = worker.Routed().double()
    (sum(model(*arguments) for arguments in passes) / len(passes)).backward()
    return {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("run", "passes"),
    [
        ("routed-ddp", worker.ROUTES),
        ("routed-fsdp2", worker.ROUTES),
        ("reversed", worker.REVERSED),
        ("mixed", worker.MIXED),
    ],
)
def test_processes_may_reach_other_tensors_in_another_order(two, run, passes):
    _, rows = rows_of(two / run)
    probed = rows.loc[1]["probe_grad_norm"].dropna()
    exact = routed_norms(passes)
    if run == "routed-fsdp2":  # FSDP gives zeros to what no process reached
        unreached = probed[~probed.index.isin(exact)]
        assert len(unreached) == 6
        assert (unreached == 0).all()
        probed = probed.drop(unreached.index)
    if run == "mixed":  # half of a gradient that comes out of order is gone when the other comes
        exact = {name: norm for name, norm in exact.items() if not re.search(r"layers\.[12]", name)}
        assert len(exact) == 9
    assert set(probed.index) == set(exact)
    for name, value in probed.items():
        assert value == pytest.approx(exact[name], rel=1e-5), name


def test_what_rests_in_a_sharded_model_is_measured_too(two):
    """In bf16, as FSDP's mixed precision computes."""
    _, rows = rows_of(two / "resting")
    probed = rows.loc[1]["probe_grad_norm"]
    exact = gradients(worker.small().double(), worker.batches(0)[0])
    assert set(probed.index) == set(exact)
    for name, value in probed.items():
        assert value == pytest.approx(float(exact[name].norm()), rel=3e-2), name


def test_a_pass_that_fails_in_a_sharded_model_stops_training(two):
    run = load(two / "failing-fsdp2")
    assert (run.status, run.manifest["error"]) == ("failed", "ValueError: no loss")


def test_a_pass_that_fails_on_one_process_ends_the_probing_on_all(two):
    for number in range(3):
        run, rows = rows_of(two / f"failing-{number}")
        assert "probe_grad_norm" not in rows or rows["probe_grad_norm"].isna().all()
        [message] = run.events["message"]
        assert "nothing is probed any more: " in message


# ---------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("name", cases("trainer-ddp", "trainer-fsdp2"))
def test_trainer_with_two_processes_records_what_one_does(one, two, name):
    folder, _ = one
    worker.trainer(folder / name, 0, 1, None if name == "trainer-ddp" else worker.small())
    assert_same(folder / name, two / name, (*COLUMNS, "probe_grad_norm"))
    assert (load(two / name).scalars["clip_coef"] < 1).all()


def test_gradient_noise_in_trainer_with_two_processes(one, two):
    """Micro-batches of unequal numbers of tokens, of which each counts in the step's mean."""
    folder, _ = one
    done = worker.trainer(folder / "noise", 0, 1)
    whole = done.batches[: worker.MICRO]
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in whole)
    model = llama().double()
    samples = []
    for batch in whole:
        for part in (slice(0, 2), slice(2, 4)):
            rows = {name: value[part] for name, value in batch.items()}
            labels = rows.pop("labels")[:, 1:].flatten()
            logits = model(**rows).logits[:, :-1].flatten(0, 1)
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (4 * loss / total).backward()
            samples.append({n: p.grad.clone() for n, p in model.named_parameters()})
    exact = variance(samples)
    _, rows = rows_of(two / "trainer-ddp")
    measured = rows.loc[1]["grad_noise"].dropna()
    assert len(measured) == 30
    for name, value in measured.items():
        assert value == pytest.approx(exact[name], rel=1e-4), name


@pytest.mark.slow
def test_adapters_in_trainer_on_a_sharded_model(one, two):
    folder, _ = one
    worker.trainer(folder / "trainer-adapters", 0, 1, worker.with_adapters(worker.small()))
    columns = (*COLUMNS, "delta_norm", "merged_norm", "probe_grad_norm")
    assert_same(folder / "trainer-adapters", two / "trainer-adapters", columns)


@pytest.mark.parametrize("name", cases("trainer-saved", "trainer-lisa"))
def test_a_resume_with_another_number_of_processes_is_told(two, tmp_path, name):
    """The same global batches: the sums have other parts, and everything else is as it was."""
    shutil.copytree(two / name, tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "out" / "checkpoint-2")
    lisa = worker.LISA if name == "trainer-lisa" else None
    with pytest.warns(RuntimeWarning, match=r"processes = 2 \(now 1\).* still takes 8 rows"):
        worker.trainer(tmp_path / "run", 0, 1, lisa=lisa, checkpoint=checkpoint, **worker.SAVING)
    assert_resumed(tmp_path / "run", 2, 1)
    before, after = rows_of(two / name)[1], rows_of(tmp_path / "run")[1]
    expected = before.loc[4]["weight_norm"]
    assert np.allclose(after.loc[4]["weight_norm"].loc[expected.index], expected, rtol=1e-5)
    losses, wanted = (load(path).scalars["loss"] for path in (tmp_path / "run", two / name))
    assert np.allclose(losses, wanted, rtol=1e-5)


def test_two_processes_go_on_with_what_one_began(one, two):
    folder, _ = one
    worker.trainer(folder / "trainer-joined", 0, 1, lisa=worker.LISA, **worker.SAVING)
    assert_resumed(two / "trainer-joined", 1, 2)
    assert_same(folder / "trainer-joined", two / "trainer-joined", (*COLUMNS, "probe_grad_norm"))
    draws = [
        run.events.loc[run.events["event"] == "lisa_draw", "layers"].tolist()
        for run in (load(folder / "trainer-joined"), load(two / "trainer-joined"))
    ]
    assert draws[0][:2] == draws[1][:2]


def assert_resumed(path, before, after):
    """Hold what a run says about the processes of its two segments."""
    run = load(path)
    resume = run.events.query("event == 'resume'").iloc[0]
    assert resume["changes"] == {
        "processes": [before, after], "per_device_train_batch_size": [4 // before, 4 // after],
    }  # fmt: skip
    assert resume["processes"] == after
    said = run.events.query("event == 'warning'")["message"].tolist()
    assert any(f"processes = {before} (now {after})" in text for text in said)
    assert [segment["processes"] for segment in run.manifest["segments"]] == [before, after]
    assert run.manifest["hardware"]["processes"] == after


def test_lisa_in_trainer_with_two_processes_is_that_of_one(one, two):
    folder, _ = one
    done = worker.trainer(folder / "trainer-lisa", 0, 1, lisa=worker.LISA, **worker.SAVING)
    assert_same(folder / "trainer-lisa", two / "trainer-lisa", (*COLUMNS, "probe_grad_norm"))
    draws = [
        run.events.loc[run.events["event"] == "lisa_draw", "layers"].tolist()
        for run in (load(folder / "trainer-lisa"), load(two / "trainer-lisa"))
    ]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 2
    _, rows = rows_of(two / "trainer-lisa")
    assert rows["probe_grad_norm"].notna().groupby("step").sum().loc[[2, 4]].tolist() == [30, 30]
    # Measuring passes leave no trace: neither here nor in a run without them.
    bare = worker.trainer(folder / "unprobed", 0, 1, lisa=worker.LISA, record={"probe_every": 0})
    trained = torch.load(two / "trainer-lisa" / "model.pt")
    for other in (done, bare):
        for name, value in other.model.state_dict().items():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_lisa_in_trainer_on_a_sharded_model(one, two):
    folder, _ = one
    done = worker.trainer(folder / "trainer-lisa-fsdp2", 0, 1, worker.small(), lisa=worker.LISA)
    columns = (*COLUMNS, "probe_grad_norm")
    assert_same(folder / "trainer-lisa-fsdp2", two / "trainer-lisa-fsdp2", columns)
    trained = torch.load(two / "trainer-lisa-fsdp2" / "model.pt")
    for name, value in done.model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_a_resume_of_a_model_that_transformers_sharded_is_refused_before_anything_is_written(two):
    """That it is refused, on every process, is asserted in `trainer_fsdp2_saved`."""
    assert load(two / "trainer-fsdp2-saved").status == "finished"
    assert not (two / "trainer-fsdp2-again" / "run.json").exists()


def test_models_are_what_the_tests_take_them_for():
    assert len(list(llama().parameters())) == len(list(worker.small().parameters())) == 30


def test_processes_weigh_a_loss_by_their_labels(monkeypatch):
    """Three labels here and one there; none anywhere; one that has none; and none counted."""
    nan = float("nan")
    here = [
        {"loss": 2.0, "labels": 3, "tokens": 5},
        {"loss": 0.0, "labels": 0, "tokens": 1},
        {"loss": nan, "labels": 0, "tokens": 1},
        {"loss": 1.0, "tokens": 1},
    ]
    there = [
        {"loss": 6.0, "labels": 1, "tokens": 6},
        {"loss": 0.0, "labels": 0, "tokens": 1},
        {"loss": 4.0, "labels": 2, "tokens": 1},
        {"loss": 2.0, "tokens": 1},
    ]
    processes = object.__new__(Processes)
    processes.count, processes._device = 2, torch.device("cpu")
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda joined: sent.append(joined.clone()))
    for lines in (there, here):
        processes.merge([], [dict(line) for line in lines])
    monkeypatch.setattr(dist, "all_reduce", lambda joined: joined.copy_(sent[0] + sent[1]))
    lines = [dict(line) for line in here]
    processes.merge([], lines)
    merged = to_host(lines)
    assert [line["tokens"] for line in merged] == [11, 2, 2, 2]
    assert [line.get("labels") for line in merged] == [4, 0, 2, None]
    assert [merged[i]["loss"] for i in (0, 2, 3)] == [(2 * 3 + 6 * 1) / 4, 4.0, 1.5]
