"""`record.probe_batches`: independent batches at chosen steps, and a training left untouched."""

import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_probe import check, expected, float64_gradients, rows
from helpers_recording import Witness, arguments, examples, llama
from transformers import Trainer, TrainerCallback

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.metrics.log import measurements
from lisa_analysis.metrics.registry import find_metric
from lisa_analysis.rundir.opening import load
from lisa_analysis.statistics.paired import change


def model_of(method):
    model = llama(attention_dropout=0.1)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        return get_peft_model(
            model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "up_proj"])
        )
    return model


class Drawing(torch.utils.data.Dataset):
    """Examples that every random state has a part in."""

    def __init__(self, n=64):
        self.rows = examples(n)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = dict(self.rows[index])
        replaced = random.randrange(12), int(np.random.randint(12))  # noqa: NPY002
        ids = row["input_ids"].clone()
        ids[list(replaced)] = int(torch.randint(3, 40, ()))
        return row | {"input_ids": ids}


def trained(folder, method, **record):
    """Train, and return everything that a probe may not touch."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model = model_of(method)
    trainer = Trainer(
        model,
        arguments(folder / "out", max_steps=5, gradient_accumulation_steps=2, seed=3),
        train_dataset=Drawing(),
    )
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=2) if method == "lisa" else None
    config = lt.RecordConfig(str(folder / "run"), every=1, **record)
    lt.attach(trainer, lisa=lisa, record=config)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    states = [
        {k: v for k, v in trainer.optimizer.state[p].items() if torch.is_tensor(v)}
        for p in model.parameters()
        if p in trainer.optimizer.state
    ]
    streams = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    return model, losses, states, streams, load(folder / "run")


@pytest.mark.parametrize("method", ["full", "lisa", "lora"])
def test_the_training_is_the_same_to_the_bit(tmp_path, method):
    plain = trained(tmp_path / "plain", method)
    probed = trained(tmp_path / "probed", method, probe_every=2, probe_batches=3)
    for (name, a), b in zip(plain[0].named_parameters(), probed[0].parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad
    assert plain[1] == probed[1]
    assert len(plain[2]) == len(probed[2]) > 0
    for a, b in zip(plain[2], probed[2], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(plain[3][0], probed[3][0])
    assert np.array_equal(plain[3][1], probed[3][1])
    assert plain[3][2] == probed[3][2]
    # And what is recorded of it: everything but the probes' own column.
    a, b = (run.metrics().drop(columns="probe_grad_norm") for run in (plain[4], probed[4]))
    b = b.dropna(subset=["weight_norm"]).reset_index(drop=True)
    assert a.equals(b)
    # Every layer is there, at the start, at every second step and at the end.
    frame = probed[4].probes
    assert sorted(frame["step"].unique()) == [0, 2, 4, 5]
    tensors = len(list(plain[0].parameters()))
    assert len(frame) == 4 * (3 + 1) * tensors
    events = probed[4].events
    assert events.loc[events["event"] == "probe", "step"].tolist() == [0, 2, 4, 5]


class Seen(Witness):
    """Keeps the batches of the probes: of those that are not a step's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.probes = SimpleNamespace(batches={})  # a plain dict of a trainer's is put back
        self.training = False

    def training_step(self, *args, **kwargs):
        self.training = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.training = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not self.training:
            batch = {k: v.clone() for k, v in inputs.items()}
            self.probes.batches.setdefault(self.state.global_step, []).append(batch)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_every_number_is_that_of_float64_at_the_weights_of_the_step(tmp_path):
    start = llama()
    trainer = Seen(llama(), arguments(tmp_path / "out", max_steps=4), train_dataset=examples())
    config = lt.RecordConfig(str(tmp_path / "run"), every=2, probe_every=2, probe_batches=4)
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=2)
    lt.attach(trainer, lisa=lisa, record=config)
    trainer.train()
    frame = rows(tmp_path / "run")
    run = load(tmp_path / "run")
    norms = run.metrics(["probe_grad_norm"]).dropna()
    assert sorted(frame["step"].unique()) == [0, 2, 4]
    assert sorted(norms["step"].unique()) == [2, 4]  # the rows of step 0 are never rewritten
    seen = []
    for step, probed in frame.groupby("step"):
        model = llama().double()
        model.load_state_dict(trainer.seen[step]["after"] if step else start.state_dict())
        data = trainer.probes.batches[step]
        truth = expected(float64_gradients(model, data), dict(model.named_parameters()))
        assert set(probed["name"]) == set(truth)
        check(probed, truth)
        at_step = norms[norms["step"] == step]
        names = dict(zip(run.parameters["param_id"], run.parameters["name"], strict=True))
        for row in at_step.itertuples():
            square = np.square(truth[names[row.param_id]]["grad_norm"]).mean()
            assert row.probe_grad_norm == pytest.approx(np.sqrt(square), rel=1e-5)
        examples_of = [tuple(ids.tolist()) for batch in data for ids in batch["input_ids"]]
        assert len(set(examples_of)) == 8  # nothing twice within a probe
        seen.append(set(examples_of))
    assert seen[0] == seen[1] == seen[2]  # and each probe has the same
    events = run.events
    draws = events.loc[events["event"] == "probe", "draw"]
    assert draws.nunique() == 1
    assert len(draws) == 3


def test_probes_of_equal_weights_are_equal_whatever_is_random(tmp_path):
    """Examples, what they draw themselves, and dropout: at a learning rate of 0 nothing differs."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    trainer = Trainer(
        model_of("lora"),
        arguments(tmp_path / "out", max_steps=3, learning_rate=0.0, weight_decay=0.0),
        train_dataset=Drawing(),
    )
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1, probe_batches=6)
    lt.attach(trainer, record=config)
    trainer.train()
    frame = load(tmp_path / "run").probes
    first, *others = (part.drop(columns="step").reset_index(drop=True)
                      for _, part in frame.groupby("step"))  # fmt: skip
    assert len(others) == 3
    assert (first["grad_norm"].dropna() > 0).any()
    for other in others:
        pd.testing.assert_frame_equal(first, other)
    assert first.loc[first["batch"] == 0, "grad_norm"].sum() != pytest.approx(
        first.loc[first["batch"] == 1, "grad_norm"].sum(), rel=1e-3
    )
    found = la.probe_change(tmp_path / "run")
    assert found.paired
    assert set(found.layers["change"]) == {"within"}
    assert found.statement.endswith("Both probes are of the same batches, compared batch by batch.")
    assert (found.layers["joint_high"] == 0).all()


def test_the_change_of_a_trained_model_is_told_more_narrowly_than_by_other_batches(tmp_path):
    trainer = Trainer(
        llama(), arguments(tmp_path / "out", max_steps=2, learning_rate=1e-4),
        train_dataset=examples(64),
    )  # fmt: skip
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=2, probe_batches=12)
    lt.attach(trainer, record=config)
    trainer.train()
    found = la.probe_change(tmp_path / "run").layers
    paired = (found["high"] - found["low"]).to_numpy(dtype=float)
    # The same gradients with the batches of the second probe in another order: not paired.
    data = measurements(load(tmp_path / "run"), "layer")
    before, after = (find_metric(f"grad_signal@{step}")(data)[:, : len(found)] for step in (0, 2))
    apart = change(before, np.roll(after, 5, axis=0), confidence=0.95,
                   rng=np.random.default_rng(0), least=6)  # fmt: skip
    np.testing.assert_allclose(apart.difference, found["difference"])
    assert paired.sum() < 0.5 * (apart.high - apart.low).sum()


def test_without_dropout_or_training_mode_the_first_probe_is_as_training_is(tmp_path):
    """`from_pretrained` leaves a model in eval mode: the probe of the start does not."""
    model = llama().eval()
    modes = []
    model.model.layers[0].register_forward_hook(lambda m, i, o: modes.append(m.training))
    trainer = Trainer(model, arguments(tmp_path / "out", max_steps=1), train_dataset=examples())
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1, probe_batches=2)
    lt.attach(trainer, record=config)
    trainer.train()
    assert modes == [True] * 5


def test_a_loss_scale_is_taken_off(tmp_path):
    data = [
        {k: torch.stack([row[k] for row in examples(8)[2 * i : 2 * i + 2]]) for k in examples(1)[0]}
        for i in range(3)
    ]
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path / "run"))) as recorder:
        passes = [lambda b=b: (1024 * model(**b).loss).backward() for b in data]
        recorder.probe(0, passes, gradient_scale=torch.tensor([1024.0]))
    truth = expected(float64_gradients(model, data), dict(model.named_parameters()))
    check(rows(tmp_path / "run"), truth)


def test_a_pass_that_fails_ends_the_probes_and_not_the_training(tmp_path):
    class Failing(Seen):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not self.training and self.state.global_step == 2:
                raise RuntimeError("no memory for this")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Failing(llama(), arguments(tmp_path / "out"), train_dataset=examples())
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=1, probe_batches=2)
    lt.attach(trainer, record=config)
    with pytest.warns(RuntimeWarning, match=r"nothing is probed any more: .*no memory"):
        trainer.train()
    assert trainer.state.global_step == 4
    run = load(tmp_path / "run")
    assert run.status == "finished"
    assert sorted(run.probes["step"].unique()) == [0, 1]
    assert all(p.requires_grad for p in trainer.model.parameters())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from examples()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Stream(), "the training data are a stream"),
        (examples(9), "of 2 examples each, but the training data have 9; give at most 4"),
    ],
)
def test_what_it_cannot_draw_from_is_refused_before_the_first_step(tmp_path, data, said):
    trainer = Trainer(llama(), arguments(tmp_path / "out"), train_dataset=data)
    config = lt.RecordConfig(str(tmp_path / "run"), probe_every=1, probe_batches=5)
    lt.attach(trainer, record=config)
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "run" / "run.json").exists()


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"record\.probe_every 0"):
        lt.RecordConfig("x", probe_batches=4)
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        lt.RecordConfig("x", probe_every=2, probe_batches=0)


class OwnLoss(Trainer):
    """Divides its loss by the micro-batches of the step, as TRL's GRPO trainer does."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_divides_itself_is_probed_whole_from_the_start(tmp_path):
    norms = {}
    for accumulation in (1, 4):
        trainer = OwnLoss(
            llama(),
            arguments(
                tmp_path / f"out{accumulation}", max_steps=1, learning_rate=0.0,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=examples(),
        )  # fmt: skip
        run = tmp_path / f"run{accumulation}"
        record = lt.RecordConfig(str(run), every=1, probe_every=1, probe_batches=2)
        lt.attach(trainer, record=record)
        trainer.train()
        assert trainer.current_gradient_accumulation_steps == accumulation
        rows = pd.concat(pd.read_parquet(file) for file in sorted(run.glob("probes/*.parquet")))
        assert set(rows["step"]) == {0, 1}
        norms[accumulation] = rows["grad_norm"].to_numpy()
    np.testing.assert_array_equal(norms[1], norms[4])


def test_a_training_that_a_callback_ends_is_probed_at_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = Trainer(
        llama(),
        arguments(tmp_path / "out", max_steps=9, eval_strategy="steps", eval_steps=1),
        train_dataset=examples(), eval_dataset=examples(4), callbacks=[Stop()],
    )  # fmt: skip
    record = lt.RecordConfig(str(tmp_path / "run"), every=1, probe_every=2, probe_batches=2)
    lt.attach(trainer, record=record)
    trainer.train()
    events = load(tmp_path / "run").events
    assert events.loc[events["event"] == "probe", "step"].tolist() == [0, 2, 3]
