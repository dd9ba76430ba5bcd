"""The registry of quantities: complete, and open to one that a test file brings along."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_analysis.contract.schema import METRICS_TABLE, Column, FactTable
from lisa_analysis.metrics.registry import METRICS, metric
from lisa_analysis.metrics.step_tables import step_table
from lisa_train.measure.buffers import MetricBuffer, Piece
from lisa_train.measure.config import OF_TRAINING, QUANTITIES
from lisa_train.measure.processes import Processes
from lisa_train.measure.quantities import REGISTRY, Quantities
from lisa_train.measure.step import step_measure
from lisa_train.model.layer_map import find_layers
from lisa_train.model.tensor_table import TensorTable


def column(name, adds="values", of_training=True, **more):
    kind = "int32" if adds == "copies" else "float32"
    return Column(name, kind, True, f"{name}, of a test", adds, of_training=of_training, **more)


OWN = (
    # How many elements are positive; ‖max(g, 0)‖; Σ of the change, of either sign; ‖W‖₁; ‖W‖².
    lt.Quantity(column("grad_positive"), "gradients", lambda g: (g > 0).sum()),
    lt.Quantity(
        column("grad_positive_norm", "squares"),
        "gradients",
        lambda g: g.clamp_min(0).square().sum(),
    ),
    lt.Quantity(column("drift", signed=True), "update", lambda old, new: (new - old).sum()),
    lt.Quantity(column("weight_l1", of_training=False), "weights", lambda w: w.abs().sum()),
    lt.Quantity(column("weight_square", of_training=False), "census", lambda w: w.square().sum()),
)  # fmt: skip
NAMES = tuple(quantity.name for quantity in OWN)


@pytest.fixture
def own():
    for quantity in OWN:
        quantity.register()
    yield OWN
    for quantity in OWN:
        REGISTRY.remove(quantity.name)


def model_of(layers=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[
        torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
        for _ in range(layers)
    ])  # fmt: skip


def train(folder, model, *, scale=1.0, inside=False, every=1, steps=3, **config):
    """Train; return what every step did, in float64."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    stepping = lt.StepInBackward(optimizer) if inside else None
    exact = {}
    record = lt.RecordConfig(str(folder), every=every, on_record_error="raise", **config)
    with lt.NormRecorder(model, optimizer, record, step_in_backward=stepping) as recorder:
        for step in range(1, steps + 1):
            before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean() * scale
            if inside:
                copy = model_of()
                copy.load_state_dict(model.state_dict())
                copy(x).square().mean().backward()
                gradients = {n: p.grad.double() for n, p in copy.named_parameters()}
            loss.backward()
            if not inside:
                gradients = {
                    n: p.grad.double() / scale
                    for n, p in model.named_parameters() if p.grad is not None
                }  # fmt: skip
                recorder.before_step(step, gradient_scale=scale)
                for p in model.parameters():
                    p.grad = None if p.grad is None else p.grad / scale
            optimizer.step()
            recorder.after_step(step, loss=loss)
            optimizer.zero_grad()
            after = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            exact[step] = gradients, before, after
    if stepping is not None:
        stepping.close()
    return exact


def check(folder, exact):
    """Hold every recorded number of one's own against float64; return the rows of training."""
    run = la.load(folder)
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics()
    trained = rows[rows["grad_positive"].notna()]
    for row in trained.itertuples():
        gradients, before, after = exact[row.step]
        name = names[row.param_id]
        g, old, new = gradients[name], before[name], after[name]
        assert row.grad_positive == int((g > 0).sum())
        assert row.grad_positive_norm == pytest.approx(float(g.clamp_min(0).norm()), rel=1e-4)
        assert row.drift == pytest.approx(
            float((new - old).sum()), rel=1e-3, abs=1e-4 * float((new - old).abs().sum())
        )
        assert row.weight_l1 == pytest.approx(float(new.abs().sum()), rel=1e-5)
    last = max(exact)
    census = rows[rows["weight_square"].notna()]
    assert set(census["step"]) == {0, last}
    assert len(census) == 2 * len(names)
    for row in census.itertuples():
        weight = (
            exact[1][1][names[row.param_id]]
            if row.step == 0
            else exact[last][2][names[row.param_id]]
        )
        assert row.weight_square == pytest.approx(float(weight.square().sum()), rel=1e-5)
    assert len(trained)
    return run, trained


@pytest.mark.parametrize("way", [{}, {"scale": 1024.0}, {"inside": True}, {"every": 2, "steps": 5}])
def test_quantities_of_ones_own_are_recorded_and_read_back(tmp_path, own, way):
    exact = train(tmp_path, model_of(), quantities=(*QUANTITIES, *NAMES), **way)
    run, trained = check(tmp_path, exact)
    assert (trained["drift"] < 0).any()  # nothing took a signed number for damage
    assert not run.warnings
    assert run.manifest["recording"]["quantities"][-len(NAMES) :] == list(NAMES)


def test_they_are_enough_by_themselves(tmp_path, own):
    exact = train(tmp_path, model_of(), quantities=NAMES)
    run, trained = check(tmp_path, exact)
    assert len(trained) == 3 * 12
    assert run.metrics()[["grad_norm", "update_norm", "opt_steps"]].isna().all().all()


def test_frozen_tensors_have_none_of_training(tmp_path, own):
    model = model_of()
    model[1].requires_grad_(False)
    exact = train(tmp_path, model, quantities=(*QUANTITIES, *NAMES))
    _, trained = check(tmp_path, exact)
    assert trained.groupby("step").size().tolist() == [8] * 3


def test_layers_are_summed_as_the_column_says_and_a_metric_reads_it(tmp_path, own):
    exact = train(tmp_path, model_of(), quantities=(*QUANTITIES, *NAMES), steps=8)
    run = la.load(tmp_path)
    table = step_table(run)
    for n, step in enumerate(table.steps):
        gradients, before, after = exact[step]
        for layer in range(3):
            names = [name for name in gradients if name.startswith(f"{layer}.")]
            count = sum(int((gradients[name] > 0).sum()) for name in names)
            norm = np.sqrt(sum(float(gradients[n].clamp_min(0).square().sum()) for n in names))
            drift = sum(float((after[name] - before[name]).sum()) for name in names)
            size = sum(float((after[name] - before[name]).abs().sum()) for name in names)
            assert table["grad_positive"][n, layer] == count
            assert table["grad_positive_norm"][n, layer] == pytest.approx(norm, rel=1e-4)
            assert table["drift"][n, layer] == pytest.approx(drift, rel=1e-3, abs=1e-4 * size)

    # A share is no size: it is not to be brought to what all layers share at a step.
    @metric("linear", "Mean share of positive elements.", needs=("grad_positive",), levels=False)
    def positive_share(log):
        return log.table["grad_positive"] / log.table.numel

    try:
        profile = la.importance(run, metric="positive_share")
    finally:
        METRICS.remove("positive_share")
    scores = profile.to_frame().set_index("layer")["score"]
    for layer in range(3):
        shares = [
            sum(int((g > 0).sum()) for name, g in gradients.items() if name.startswith(f"{layer}."))
            / sum(g.numel() for name, g in gradients.items() if name.startswith(f"{layer}."))
            for gradients, _, _ in exact.values()
        ]  # fmt: skip
        assert scores[layer] == pytest.approx(np.mean(shares), rel=1e-5)


def test_a_process_that_does_not_know_the_column_reads_the_rest(tmp_path, own):
    train(tmp_path, model_of(), quantities=(*QUANTITIES, *NAMES))
    code = (
        "import lisa_analysis as la\n"
        "from lisa_analysis.contract.schema import METRICS_TABLE, Column\n"
        f"run = la.load({str(tmp_path)!r})\n"
        "assert tuple(run.metrics()) == METRICS_TABLE.names and run.metrics()['grad_norm'].any()\n"
        "METRICS_TABLE.add(Column('drift', 'float32', True, 'x', 'values', True, True))\n"
        f"assert la.load({str(tmp_path)!r}).metrics()['drift'].min() < 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_column_does_over_processes(own):
    """Two copies of a tensor are one; what each counts itself is a copy whatever the sharding."""
    table = TensorTable(model_of(), find_layers(model_of()), None)
    processes = Processes(table)
    processes.count = 2
    processes._shares = {i: 0.5 if i % 2 else 1.0 for i, _ in table.tensors}
    ids = np.arange(4)
    for name in (*QUANTITIES, *NAMES):
        weights = processes._weights(Piece(name, ids, torch.ones(4)))
        if METRICS_TABLE[name].adds == "copies":
            assert weights == 0.5
        else:
            assert weights.tolist() == [1.0, 0.5, 1.0, 0.5]


# ------------------------------------------------------------------ nothing can be forgotten


def test_every_column_has_an_entry_and_a_part_that_measures_it():
    assert tuple(REGISTRY) == METRICS_TABLE.measured
    assert QUANTITIES == lt.RecordConfig().quantities == REGISTRY.choosable()
    assert set(OF_TRAINING) == {
        "grad_norm", "grad_norm_l1", "update_norm", "descent", "opt_steps",
    }  # fmt: skip
    for name, quantity in REGISTRY.items():
        if quantity.option is not None:
            assert hasattr(lt.RecordConfig(), quantity.option), name


def test_one_that_shares_a_read_is_a_column_and_a_line_in_a_part(tmp_path, monkeypatch):
    """What is built in follows from the columns: no other module has to know the name."""

    class Gradients(step_measure.Gradients):
        measures = step_measure.Gradients.measures | {"grad_square"}

        def gradients(self, now):
            super().gradients(now)
            if "grad_square" in self.want:
                square, _ = now.gradient_sums(magnitudes=False)
                self.buffer.add(now.step, "grad_square", now.numbers, square / now.scale**2)

    METRICS_TABLE.add(Column("grad_square", "float32", True, "", "values", when="gradients"))
    try:
        monkeypatch.setattr(REGISTRY, "_found", Quantities(METRICS_TABLE)._found)
        monkeypatch.setattr(step_measure, "Gradients", Gradients)
        assert REGISTRY["grad_square"].column.of_training
        train(tmp_path, model_of(), quantities=REGISTRY.choosable(), scale=1024.0)
        rows = la.load(tmp_path).metrics(["grad_norm", "grad_square"]).dropna()
        assert len(rows) == 3 * 12
        assert rows["grad_square"].to_numpy() == pytest.approx(rows["grad_norm"] ** 2, rel=2e-5)
    finally:
        METRICS_TABLE.remove("grad_square")


def test_a_column_without_its_moment_is_no_quantity():
    columns = (*METRICS_TABLE.columns, column("grad_max"))
    with pytest.raises(ConfigError, match="'grad_max' has when=None"):
        Quantities(FactTable("metrics", "metrics", "", columns))


def test_a_quantity_that_no_part_measures_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(step_measure.Updates, "measures", frozenset({"weight_norm", "descent"}))
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(NotImplementedError, match="no part measures update_norm"):
        lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path)))


def test_a_sum_of_an_unknown_column_never_becomes_a_number():
    buffer = MetricBuffer()
    buffer.add(1, "grad_nrm", np.arange(2), torch.ones(2))
    with pytest.raises(KeyError, match="grad_norm"):
        list(buffer.take())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"adds": None}, "say how its numbers add up"),
        ({"adds": "max"}, "one of squares, values, copies"),
        ({"adds": "copies"}, "of type int32"),
        ({"type": "float64"}, "of type float32"),
        ({"nullable": False}, "nullable"),
        ({"adds": "squares", "signed": True}, "only what adds as values can be signed"),
        ({"name": "Grad Max"}, "small letters"),
        ({"name": "grad_norm"}, "is built in"),
    ],
)
def test_a_column_that_leaves_something_open_is_refused(change, text):
    wrong = dataclasses.replace(column("grad_max"), **change)
    with pytest.raises(LisaError, match=text):
        METRICS_TABLE.add(wrong)
    assert "grad_max" not in METRICS_TABLE.names
    if "name" not in change:  # nor can a built-in be forgotten
        with pytest.raises(LisaError, match=text):
            FactTable("metrics", "metrics", "", (*METRICS_TABLE.columns[:2], wrong))


def test_a_quantity_that_cannot_be_is_refused(own):
    measure = torch.sum
    with pytest.raises(ConfigError, match="when='before'"):
        lt.Quantity(column("grad_sum"), "before", measure)
    with pytest.raises(ConfigError, match="of_training=True"):
        lt.Quantity(column("grad_sum", of_training=False), "gradients", measure)
    with pytest.raises(ConfigError, match="function `measure`"):
        lt.Quantity(column("grad_sum"), "gradients").register()
    with pytest.raises(LisaError, match="built in"):
        lt.Quantity(METRICS_TABLE["grad_norm"], "gradients", measure).register()
    with pytest.raises(ConfigError, match=r"grad_positiv'.*Did you mean.*grad_positive"):
        lt.RecordConfig("x", quantities=("grad_positiv",))
    with pytest.raises(LisaError, match="none that was added"):
        REGISTRY.remove("grad_norm")


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (lambda g: g.missing, "its measure failed: AttributeError"),
        (lambda g: g.abs(), r"returned a tensor of shape \(5, 5\)"),
        (lambda g: 1.0, "returned 1.0, expected a tensor of one element"),
    ],
)
def test_a_measure_that_fails_is_said_in_words(tmp_path, measure, text):
    quantity = lt.Quantity(column("grad_wrong"), "gradients", measure).register()
    try:
        with pytest.raises(LisaError, match=f"quantity 'grad_wrong': .*{text}"):
            train(tmp_path, model_of(), quantities=("grad_wrong", "grad_norm"))
    finally:
        REGISTRY.remove(quantity.name)
