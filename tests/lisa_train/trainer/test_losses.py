"""Losses per label: models that compute a mean whatever they are told, and several processes."""

import json

import pytest
import torch
from helpers_processes import launched
from helpers_recording import arguments, llama
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.trainer.losses import evaluate_per_label, is_plain_mean, take_means

HALVES = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2,
    "dropout": 0.0, "vocab_size": 50,
}  # fmt: skip


def _bert(**settings):
    return BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3,
        **settings,
    )  # fmt: skip


def _t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=32, dropout_rate=0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _classes(rows, classes=3):
    return [
        {"input_ids": torch.arange(3, 12) + i % 5, "labels": torch.tensor(i % classes)}
        for i in range(rows)
    ]


def _texts(rows):
    """Every other two rows have few labels, so that means of batches are not the mean."""
    drawn = torch.Generator().manual_seed(1)
    found = []
    for row in range(rows):
        ids = torch.randint(3, 50, (12,), generator=drawn)
        labels = torch.where(torch.arange(12) < (2 if row % 4 < 2 else 12), ids, -100)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def _sounds():
    return {"input_features": torch.randn(2, 8, 40), "labels": torch.tensor([[3, 4, 5], [3, 6, 7]])}


def _batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _dinov2(**settings):
    return Dinov2ForImageClassification(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=14, patch_size=7,
            num_labels=3, **settings,
        )
    )  # fmt: skip


def _pictures(classes):
    labels = torch.randint(0, classes, (4,))
    return {"pixel_values": torch.randn(4, 3, 14, 14), "labels": labels}


MODELS = {
    "llama": (llama, lambda: _batch(_texts(4)), False),
    "llama classes": (
        lambda: LlamaForSequenceClassification(llama(num_labels=3, pad_token_id=0).config),
        lambda: _batch(_classes(4)), True,
    ),
    "dinov2": (_dinov2, lambda: _pictures(3), False),
    "dinov2 numbers": (
        lambda: _dinov2(problem_type="regression"),
        lambda: {**_pictures(3), "labels": torch.randn(4, 3)}, True,
    ),
    "bert classes": (
        lambda: BertForSequenceClassification(_bert()), lambda: _batch(_classes(4)), True,
    ),
    "bert tokens": (
        lambda: BertForTokenClassification(_bert()),
        lambda: {**_batch(_classes(4)), "labels": torch.randint(0, 3, (4, 9))}, True,
    ),
    "t5": (_t5, lambda: _batch(_texts(4)), True),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**HALVES)), lambda: _batch(_texts(4)), True,
    ),
    "whisper": (
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(**HALVES, num_mel_bins=8, max_source_positions=20, max_target_positions=9)
        ),
        _sounds, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_a_model_is_what_it_does(tmp_path, name):
    make, batch, plain = MODELS[name]
    torch.manual_seed(0)
    trainer = Trainer(make(), arguments(tmp_path))
    assert trainer.model_accepts_loss_kwargs
    assert is_plain_mean(trainer) is plain
    model, inputs = trainer.model.eval(), batch()
    with torch.no_grad():
        one, two = (model(**inputs, num_items_in_batch=items).loss for items in (10, 20))
    assert bool(one == two) is plain
    take_means(trainer)
    assert trainer.model_accepts_loss_kwargs is not plain


def test_a_trainer_with_a_loss_of_its_own_is_taken_at_its_word(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise NotImplementedError

    model = BertForSequenceClassification(_bert())
    assert not is_plain_mean(Own(model, arguments(tmp_path)))
    own = Trainer(model, arguments(tmp_path), compute_loss_func=lambda *given, **more: None)
    assert not is_plain_mean(own)
    smooth = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    assert not is_plain_mean(smooth)  # the smoother divides by the number of labels


@pytest.mark.parametrize("mended", [False, True])
def test_means_that_trainer_adds_up_are_recorded_as_a_mean(tmp_path, mended):
    torch.manual_seed(0)
    rows = _classes(8)
    trainer = Trainer(
        BertForSequenceClassification(_bert()),
        arguments(
            tmp_path / "c", max_steps=1, per_device_train_batch_size=2, learning_rate=0.0,
            gradient_accumulation_steps=4, train_sampling_strategy="sequential", max_grad_norm=0,
            logging_steps=1,
        ),
        train_dataset=rows,
    )  # fmt: skip
    if mended:
        take_means(trainer)
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    loss = trainer.model(**_batch(rows)).loss
    loss.backward()
    norm = sum(p.grad.double().square().sum() for p in trainer.model.parameters()) ** 0.5
    run = load(tmp_path / "run")
    assert run.scalars["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    times = 1 if mended else 4  # gradients are what Trainer makes them
    assert run.scalars["grad_norm"].item() == pytest.approx(times * norm.item(), rel=1e-4)
    shown = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    assert shown == pytest.approx(times * loss.item(), rel=1e-3)
    said = [] if mended else run.events.loc[run.events["event"] == "warning", "message"].tolist()
    assert run.events["event"].eq("warning").sum() == len(said) == (not mended)
    assert mended or "up to 4 times too large" in said[0]


def _evaluated(rank, folder, kind, rows, mine):
    """Evaluate in two processes; the first writes what Trainer says, and what is exact."""
    torch.manual_seed(0)
    model = {"llama": llama, "t5": _t5}[kind]()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(8 if kind == "llama" else 1)  # losses that differ between rows
    held_out = _texts(rows)
    trainer = Trainer(
        model,
        arguments(
            folder / "c", max_steps=1, learning_rate=0.0, per_device_train_batch_size=2,
            eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2,
            train_sampling_strategy="sequential",
        ),
        train_dataset=_texts(8), eval_dataset=held_out,
    )  # fmt: skip
    if mine:
        evaluate_per_label(trainer)
    lt.attach(trainer, record=lt.RecordConfig(str(folder / "run"), every=1))
    trainer.train()
    assert trainer.args.average_tokens_across_devices
    if rank:
        return
    total = labels = 0.0
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    for row in held_out:
        count = (row["labels"] if kind == "t5" else row["labels"][1:]).ne(-100).sum().item()
        with torch.no_grad():
            total += model(**{n: v[None] for n, v in row.items()}).loss.item() * count
        labels += count
    said = next(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    found = {"exact": total / labels, "said": said}
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.processes
@pytest.mark.parametrize("mine", [False, True], ids=["attached", "lisa-train's"])
@pytest.mark.parametrize("rows", [8, 6, 5])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_held_out_losses_of_two_processes_are_per_label_and_no_row_counts_twice(
    tmp_path, kind, rows, mine
):
    launched(_evaluated, tmp_path, kind, rows, mine)
    found = json.loads((tmp_path / "found.json").read_text())
    exact = pytest.approx(found["exact"], rel=1e-5)
    assert load(tmp_path / "run").manifest["result"]["last_held_out_loss"] == exact
    if mine:
        assert found["said"] == exact


def test_what_a_decoder_writes_counts_among_the_tokens(tmp_path):
    rows = _texts(4)
    trainer = Trainer(
        _t5(), arguments(tmp_path / "c", max_steps=1, per_device_train_batch_size=4),
        train_dataset=rows,
    )  # fmt: skip
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    assert load(tmp_path / "run").scalars["tokens"].item() == 4 * 12 + 2 + 2 + 12 + 12


def test_parts_of_a_held_out_set_leave_no_one_loss_and_are_said_to(tmp_path):
    trainer = Trainer(
        llama(), arguments(tmp_path / "c", max_steps=1, eval_on_start=True),
        train_dataset=_texts(4), eval_dataset={"a": _texts(2), "b": _texts(4)},
    )  # fmt: skip
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    run = load(tmp_path / "run")
    said = run.events.loc[run.events["event"] == "warning", "message"].tolist()
    assert len(said) == 1
    assert "eval_a_loss and eval_b_loss" in said[0]
    names = {name for metrics in run.events["metrics"].dropna() for name in metrics}
    assert names >= {"eval_a_loss", "eval_b_loss"}
