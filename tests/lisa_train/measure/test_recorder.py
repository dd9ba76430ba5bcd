"""The recorder in a plain PyTorch loop, against float64 recomputation in the loop itself."""

import numpy as np
import pytest
import torch
from helpers_recording import examples, llama
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_analysis.rundir.opening import load


def batches(n):
    rows = examples(2 * n)
    for i in range(n):
        pair = rows[2 * i : 2 * i + 2]
        yield {key: torch.stack([row[key] for row in pair]) for key in pair[0]}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_plain_loop(tmp_path, optimizer, set_to_none):
    model = llama(tied=True)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    }[optimizer]
    optimizer = make(model.parameters())
    exact = {}
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=2)) as recorder:
        for step, batch in enumerate(batches(5), 1):
            loss = model(**batch).loss
            loss.backward()
            gradients = {n: p.grad.double().clone() for n, p in model.named_parameters()}
            before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            recorder.before_step(step)
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)  # no factor undoes this
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            recorder.after_step(step, loss=loss)
            exact[step] = {
                n: (gradients[n], p.detach().double() - before[n], p.detach().double().norm())
                for n, p in model.named_parameters()
            }
    run = load(tmp_path)
    assert run.status == "finished"
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    frame = run.metrics()
    assert sorted(frame["step"].unique()) == [0, 1, 2, 4, 5]
    for row in frame[frame["grad_norm"].notna()].itertuples():
        gradient, update, weight = exact[row.step][names[row.param_id]]
        assert row.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert row.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert row.weight_norm == pytest.approx(float(weight), rel=1e-5)
        product = gradient * update
        assert row.descent == pytest.approx(
            -float(product.sum()), rel=1e-5, abs=1e-5 * float(product.abs().sum())
        )
    for step in (1, 2, 4):
        total = np.sqrt(sum(float(g.norm() ** 2) for g, _, _ in exact[step].values()))
        assert run.scalars.set_index("step").loc[step, "grad_norm"] == pytest.approx(total)
    assert run.scalars["grad_norm"].isna().tolist() == [False, False, True, False, True]
    assert (run.scalars["learning_rate"] == optimizer.param_groups[0]["lr"]).all()
    assert (run.scalars["step_seconds"] > 0).all()


def test_a_loop_that_fails_leaves_a_run_that_says_so(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loop():
        with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path))) as recorder:
            recorder.before_step(1)
            recorder.after_step(1, loss=2.0)
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        loop()
    run = load(tmp_path)
    assert (run.status, run.manifest["error"]) == (
        "failed", "ZeroDivisionError: division by zero",
    )  # fmt: skip
    assert run.scalars["loss"].tolist() == [2.0]


def test_skipped_steps_have_no_update(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        model(**next(batches(1))).loss.backward()
        scale = 1024.0
        for p in model.parameters():
            p.grad.mul_(scale)
        gradients = {n: float(p.grad.norm()) / scale for n, p in model.named_parameters()}
        recorder.before_step(1, gradient_scale=scale)
        recorder.after_step(1, skipped=True)
    run = load(tmp_path)
    rows = run.metrics(steps=[1])
    assert rows["update_norm"].isna().all()
    assert rows["descent"].isna().all()
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    for row in rows.itertuples():
        assert row.grad_norm == pytest.approx(gradients[names[row.param_id]], rel=1e-5)
        assert row.weight_norm > 0
    assert run.scalars["skipped"].tolist() == [True]


def test_accumulation_in_a_plain_loop(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path), every=1, grad_noise=True)
    micro = []
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for i, batch in enumerate(batches(3)):
            before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            (model(**batch).loss / 3).backward()
            micro.append([
                p.grad.double() - (0 if b is None else b.double())
                for p, b in zip(model.parameters(), before, strict=True)
            ])  # fmt: skip
            if i < 2:
                recorder.micro_batch(1)
        recorder.before_step(1)
        optimizer.step()
        recorder.after_step(1)
    rows = load(tmp_path).metrics(["grad_noise"], steps=[1]).set_index("param_id")
    for number, parts in enumerate(zip(*micro, strict=True)):
        expected = float((3 * torch.stack(parts)).var(dim=0, unbiased=True).sum())
        assert rows.loc[number, "grad_noise"] == pytest.approx(expected, rel=1e-4)


def test_gradient_noise_of_what_one_micro_batch_reaches_alone(tmp_path):
    """What a micro-batch does not reach got nothing from it, whichever one that is."""
    torch.manual_seed(0)
    stack = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(3)]
    model, x = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(stack)}), torch.randn(4, 3)
    losses = [stack[0](stack[1](x)).square().mean(), stack[1](stack[2](x)).square().mean()]
    parts = [
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
        for loss in losses
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path), every=1, grad_noise=True)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        losses[0].backward()
        recorder.micro_batch(1)
        losses[1].backward()
        recorder.before_step(1)
        optimizer.step()
        recorder.after_step(1)
    rows = load(tmp_path).metrics(["grad_noise"], steps=[1]).set_index("param_id")["grad_noise"]
    for number, pair in enumerate(zip(*parts, strict=True)):
        exact = float((2 * torch.stack(pair).double()).var(dim=0, unbiased=True).sum())
        assert rows.loc[number] == pytest.approx(exact, rel=1e-4)


def test_gradient_noise_of_two_backward_passes_is_not_made_up(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path), every=1, grad_noise=True)

    def warned():
        return pytest.warns(RuntimeWarning, match="more than one backward pass")

    def loop(recorder):
        for step in (1, 2):
            for i, batch in enumerate(batches(2)):
                (model(**batch).loss / 2).backward()
                if i == 0:
                    model.lm_head.weight.square().mean().backward()
                    recorder.micro_batch(step)
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()

    with lt.NormRecorder(model, optimizer, config) as recorder, warned() as caught:
        loop(recorder)
    assert len(caught) == 1
    run = load(tmp_path)
    names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
    rows = run.metrics(["grad_noise", "grad_norm"], steps=[1, 2])
    missing = rows[rows["grad_noise"].isna()]
    assert {names[i] for i in missing["param_id"]} == {"lm_head.weight"}
    assert rows["grad_norm"].notna().all()
    assert run.non_finite().empty


def test_what_lies_in_memory_is_bounded_by_the_flush(tmp_path, monkeypatch):
    monkeypatch.setattr("lisa_train.measure.output.MAX_BUFFERED_ROWS", 200)
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    config = lt.RecordConfig(str(tmp_path), every=1, flush_seconds=1e9)
    most = 0
    with lt.NormRecorder(model, optimizer, config) as recorder:
        model(**next(batches(1))).loss.backward()
        for step in range(1, 60):
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            most = max(most, recorder._buffer.rows)
            assert len(recorder._lines.waiting) < 20
    assert most <= 200 + 30
    assert load(tmp_path).metrics()["step"].nunique() == 60


def test_the_loss_of_a_step_does_not_keep_its_graph(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path))) as recorder:
        loss = model(**next(batches(1))).loss
        assert loss.grad_fn is not None
        recorder.before_step(1)
        recorder.after_step(1, loss=loss)
        assert recorder._lines.waiting[-1]["loss"].grad_fn is None


def test_a_loop_continues_its_run(tmp_path):
    from lisa_train.measure.disk.writer import RunWriter

    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = lt.RecordConfig(str(tmp_path), every=1)
    recorder = lt.NormRecorder(model, optimizer, config)
    for step in (1, 2):
        recorder.after_step(step, loss=1.0)
    recorder.checkpoint(2)
    recorder.after_step(3, loss=1.0)
    recorder.close("interrupted")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        lt.NormRecorder(model, optimizer, config)
    writer = RunWriter(tmp_path, manifest={}, parameters=recorder.table.rows, resume=True, step=2)
    with lt.NormRecorder(model, optimizer, config, writer, step=2) as recorder:
        recorder.after_step(3, loss=9.0)
    run = load(tmp_path)
    assert run.scalars["loss"].tolist() == [1.0, 1.0, 9.0]
    frame = run.metrics()
    assert not frame.duplicated(["step", "param_id"]).any()
    assert frame["step"].unique().tolist() == [0, 2, 3]


def test_layers_can_be_named_where_the_structure_leaves_them_open(tmp_path):
    block = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(6)]
    model = torch.nn.ModuleDict(
        {"first": torch.nn.ModuleList(block[:2]), "second": torch.nn.ModuleList(block[2:])}
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="2 stacks of layers"):
        lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path / "a")))
    assert not (tmp_path / "a").exists()
    config = lt.RecordConfig(str(tmp_path / "b"), layers="second")
    with lt.NormRecorder(model, optimizer, config):
        pass
    assert load(tmp_path / "b").layer_names == tuple(f"second.{i}" for i in range(4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": 0}, "record.every is 0, but must be a whole number of at least 1"),
        ({"every": 2.5}, "record.every is 2.5"),
        ({"quantities": ("grad_nrm",)}, "Did you mean 'grad_norm'"),
        ({"quantities": "grad_norm"}, "give a list of names"),
        ({"select": ("(",)}, "record.select holds"),
        ({"select": ()}, "record.select is empty"),
        ({"probe_every": -1}, "record.probe_every is -1"),
        ({"probe_every": "often"}, "record.probe_every is 'often'"),
        ({"flush_seconds": "soon"}, "record.flush_seconds is 'soon'"),
        ({"flush_seconds": -1}, "record.flush_seconds is -1"),
        ({"flush_seconds": float("nan")}, "record.flush_seconds is nan"),
        ({"on_record_error": "ignore"}, "must be one of warn, raise"),
    ],
)
def test_settings_are_checked_when_they_are_made(changes, words):
    with pytest.raises(ConfigError) as caught:
        lt.RecordConfig("x", **changes)
    assert words in str(caught.value)


def test_a_run_directory_is_needed():
    model = llama()
    with pytest.raises(ConfigError, match="run_dir is not set"):
        lt.NormRecorder(model, torch.optim.SGD(model.parameters(), 0.1), lt.RecordConfig())


def test_a_loop_can_say_what_the_recorder_cannot_see(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    entries = {"method": "lisa", "lisa": {"activated_layers": 2}}
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path)), manifest=entries):
        pass
    run = load(tmp_path)
    assert (run.method, run.manifest["lisa"]) == ("lisa", {"activated_layers": 2})
    assert run.manifest["recording"]["every"] == 10  # what the recorder knows is still there


def test_weight_norms_alone_make_a_profile(tmp_path):
    """The optimizer's step count tells the rows of training from those of a census."""
    import lisa_analysis as la

    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, quantities=("weight_norm",))
    assert config.quantities == ("weight_norm", "opt_steps")
    ids = torch.stack([row["input_ids"] for row in examples(4)])
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, 6):
            model(input_ids=ids, labels=ids).loss.backward()
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
    profile = la.importance(la.load(tmp_path / "run"), "weight_norm")
    layer = sum(
        float(p.detach().double().square().sum()) for p in model.model.layers[0].parameters()
    )
    assert profile.to_frame()["initial"].notna().all()
    assert profile.scores[0] == pytest.approx(layer**0.5, rel=0.05)
    outside = profile.outside.set_index("name")["visits"]
    assert outside["embed"] == 0
    assert outside["head"] == 1


@pytest.mark.parametrize("reason", ["cannot be written", "another process"])
def test_a_loop_goes_on_without_a_directory(tmp_path, reason):
    from lisa_analysis.contract.schema import LOCK
    from lisa_train.measure.disk.storage import RunLock

    folder = tmp_path / "run"
    if reason == "another process":
        folder.mkdir()
        lock = RunLock(folder / LOCK)
    else:
        folder.write_text("a file")
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(RuntimeWarning, match=f"goes on unrecorded: .*{reason}") as caught:
        recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(folder)))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    before = [p.detach().clone() for p in model.parameters()]
    with recorder:
        model(**next(batches(1))).loss.backward()
        recorder.micro_batch(1)
        recorder.before_step(1)
        optimizer.step()
        recorder.after_step(1, loss=1.0)
        recorder.amend(epoch=1.0)
        recorder.checkpoint(1)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert recorder.latest_scalars() == {}
    config = lt.RecordConfig(str(folder), on_record_error="raise")
    with pytest.raises(RunDirectoryError, match=reason):
        lt.NormRecorder(model, optimizer, config)
    if reason == "another process":
        lock.release()


def _loop(folder, numbers, *, before=None, **record):
    """A loop that gives its steps these numbers (`before`: those of `before_step`)."""
    model = llama(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = lt.RecordConfig(str(folder), every=1, **record)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        pairs = zip(numbers, before or numbers, batches(len(numbers)), strict=True)
        for step, at_first, batch in pairs:
            loss = model(**batch).loss
            loss.backward()
            recorder.before_step(at_first)
            optimizer.step()
            recorder.after_step(step, loss=loss)
            optimizer.zero_grad()


@pytest.mark.parametrize("before", [None, [1]])
def test_a_step_numbered_from_zero_is_refused_before_anything_is_lost(tmp_path, before):
    with pytest.raises(ConfigError, match=r"_step\(0\) after .*from 1; pass the completed steps"):
        _loop(tmp_path / "run", [0], before=before)


def test_numbers_that_begin_anew_end_the_recording_and_keep_what_there_was(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"training goes on: before_step\(1\) after step 3"):
        _loop(tmp_path / "run", [1, 2, 3, 1, 2, 3])
    run = load(tmp_path / "run")
    assert run.status == "failed"
    assert run.scalars["step"].tolist() == [1, 2, 3]
    assert sorted(run.metrics(["grad_norm"]).dropna()["step"].unique()) == [1, 2, 3]
    with pytest.raises(ConfigError, match="begins anew with an epoch"):
        _loop(tmp_path / "raised", [1, 2, 1], on_record_error="raise")


def test_a_step_that_was_begun_may_be_given_up(tmp_path):
    """A loop that skips a batch whose loss is not finite, after it has called `before_step`."""
    model = llama(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        for step, batch in enumerate(batches(4), 1):
            model(**batch).loss.backward()
            recorder.before_step(step)
            if step != 2:
                optimizer.step()
                recorder.after_step(step)
            optimizer.zero_grad()
    assert load(tmp_path).scalars["step"].tolist() == [1, 3, 4]


def test_a_misspelt_scalar_is_refused_at_once(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path))) as recorder:
        recorder.before_step(1)
        with pytest.raises(ConfigError, match=r"'train_loss' is no scalar .* epoch, loss, learn"):
            recorder.after_step(1, train_loss=1.0)
        with pytest.raises(ConfigError, match="Did you mean 'epoch'"):
            recorder.amend(epochs=1.0)
        recorder.after_step(1, loss=1.0)
    run = load(tmp_path)
    assert (run.status, run.scalars["loss"].tolist()) == ("finished", [1.0])


def test_a_recording_whose_end_fails_is_not_finished(tmp_path, monkeypatch):
    def fail(self, step):
        raise RuntimeError("no census")

    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path)))
    recorder.after_step(1, loss=1.0)
    monkeypatch.setattr("lisa_train.measure.step.step_measure.StepMeasure.census", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no census"):
        recorder.close()
    run = load(tmp_path)
    assert (run.status, run.scalars["loss"].tolist()) == ("failed", [1.0])
    assert run.manifest["error"].endswith("RuntimeError: no census")


def test_peak_memory_is_that_of_all_devices_together(monkeypatch):
    from lisa_train.measure.disk.manifest import peak_memory_bytes

    peaks = {0: 5 * 2**30, 1: 7 * 2**30}
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peaks[device.index])
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    assert peak_memory_bytes(*devices) == 12 * 2**30
    assert peak_memory_bytes(devices[1]) == 7 * 2**30
    assert 2**24 < peak_memory_bytes(devices[2]) < 2**40


def test_a_probe_comes_before_the_checkpoint_of_its_step(tmp_path):
    """Else its rows would be those of a step that is on the disk, and end the recording."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = next(batches(1))
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        for step in (1, 2, 3):
            model(**batch).loss.backward()
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
            if step == 2:
                recorder.checkpoint(step)
                with pytest.warns(RuntimeWarning, match="rows of step 2 are on the disk already"):
                    recorder.probe(step, lambda: model(**batch).loss.backward())
            else:
                recorder.probe(step, lambda: model(**batch).loss.backward())
    run = load(tmp_path)
    assert run.status == "finished"
    frame = run.metrics(["grad_norm", "probe_grad_norm"])
    assert frame.dropna(subset=["grad_norm"])["step"].unique().tolist() == [1, 2, 3]
    assert frame.dropna(subset=["probe_grad_norm"])["step"].unique().tolist() == [1, 3]


class Touched(TorchDispatchMode):
    """Remembers the memory that operations read or write."""

    def __init__(self):
        super().__init__()
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.storages.add(x.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


def test_a_recorded_step_touches_no_weight_that_rests(tmp_path):
    """Adapters are recorded without their base weights, which are many times larger."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    resting = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1)) as recorder:
        for step, batch in enumerate(batches(2), 1):
            model(**batch).loss.backward()
            with Touched() as touched:
                recorder.before_step(step)
            optimizer.step()
            with touched:
                recorder.after_step(step)
            assert touched.storages & {p.untyped_storage().data_ptr() for p in trained}
            assert not touched.storages & resting
            optimizer.zero_grad()
        with Touched() as touched:
            recorder.census(2)
        assert resting <= touched.storages
    rows = load(tmp_path).metrics(["delta_norm"], steps=[1, 2])
    assert rows["delta_norm"].notna().groupby(rows["step"]).sum().tolist() == [21, 21]


@pytest.mark.parametrize("between", [False, True], ids=["in the step", "between steps"])
def test_weights_of_a_step_that_was_stopped_half_way_are_no_census(tmp_path, between):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def stopped():
        config = lt.RecordConfig(str(tmp_path), every=9)
        with lt.NormRecorder(model, optimizer, config) as recorder:
            for step, batch in enumerate(batches(3), 1):
                model(**batch).loss.backward()
                recorder.before_step(step)
                if step == 3 and not between:
                    next(iter(model.parameters())).data.add_(1.0)
                    raise KeyboardInterrupt
                optimizer.step()
                recorder.after_step(step)
                if step == 2 and between:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    run = load(tmp_path)
    assert run.status == "interrupted"
    weights = run.metrics(columns=["weight_norm"]).dropna()
    assert (2 in set(weights["step"])) is between
    assert run.scalars["step"].tolist() == [1, 2]
