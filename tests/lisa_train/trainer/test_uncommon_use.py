"""`attach` where Trainer is used in ways of its own: best weights, several calls, copies."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_recording import arguments, examples, llama, mixtral
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.rundir.events import evaluations, held_out_losses

BEST = {
    "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
    "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.1,
    "per_device_eval_batch_size": 4,
}  # fmt: skip


def trainer(folder: Path, model: Any = None, **changes: Any) -> Trainer:
    callbacks = changes.pop("callbacks", None)
    rows = changes.pop("rows", None) or examples(24)
    return Trainer(
        llama() if model is None else model, arguments(folder / "out", **changes),
        train_dataset=rows, eval_dataset=rows[:10], callbacks=callbacks,
    )  # fmt: skip


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": 3,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**sizes))


def pictures() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(24)
    ]


@pytest.mark.parametrize("kind", ["vit", "mixtral", "llama"])
def test_the_best_weights_are_loaded_whole_whatever_their_names(kind: str, tmp_path: Path) -> None:
    model = {"vit": vit, "mixtral": mixtral, "llama": llama}[kind]()
    rows = pictures() if kind == "vit" else examples(24)
    one = trainer(tmp_path, model, rows=rows, **BEST)
    lisa = lt.LisaConfig(1, 2) if kind == "mixtral" else None
    lt.attach(one, lisa=lisa, record=lt.RecordConfig(str(tmp_path / "run")))
    one.train()
    best = one.state.best_model_checkpoint
    assert not best.endswith("-6")
    stored = type(model).from_pretrained(best).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert "_load_best_model" not in vars(one)
    result = la.load(tmp_path / "run").manifest["result"]
    assert result["best_step"] == int(best.rpartition("-")[2])


def test_an_evaluation_after_training_counts_for_no_figure(tmp_path: Path) -> None:
    one = trainer(tmp_path, **{**BEST, "load_best_model_at_end": False})
    lt.attach(one, record=lt.RecordConfig(str(tmp_path / "run")))
    one.train()
    before = held_out_losses(la.load(tmp_path / "run"))
    one.evaluate(examples(24)[12:])
    run = la.load(tmp_path / "run")
    late = run.events[run.events["event"] == "evaluate"].iloc[-1]
    assert (late["step"], late["after_training"]) == (6, True)
    assert held_out_losses(run).equals(before)
    assert [step for step, _ in evaluations(run)] == [2, 4, 6]
    assert before["value"].iloc[-1] == run.manifest["result"]["last_held_out_loss"]
    # A run that goes on knows the evaluations of its training alone.
    again = trainer(tmp_path, **{**BEST, "load_best_model_at_end": False, "max_steps": 8})
    lt.attach(again, record=lt.RecordConfig(str(tmp_path / "run")), resume_incomplete=True)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-6"))
    result = la.load(tmp_path / "run").manifest["result"]
    assert result["first_held_out_loss"] == before["value"].iloc[0]


@pytest.mark.parametrize("base_is_there", [True, False])
def test_changes_are_measured_from_what_the_run_began_with(
    base_is_there: bool, tmp_path: Path
) -> None:
    """A model that was loaded from the checkpoint to go on from has other weights than W₀."""
    base, settings = tmp_path / "base", {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    llama().save_pretrained(base)

    def train(folder: str, source: Path, checkpoint: str | None = None) -> la.Run:
        model = type(llama()).from_pretrained(source)
        one = trainer(tmp_path / folder, model, **settings)
        record = lt.RecordConfig(str(tmp_path / folder / "run"), every=1, base_delta=True)
        lt.attach(one, record=record)
        one.train(resume_from_checkpoint=checkpoint)
        return la.load(tmp_path / folder / "run")

    def deltas(run: la.Run) -> Any:
        found = run.metrics(["delta_norm"]).dropna()
        return found[found["step"] == 4].set_index("param_id")["delta_norm"].sort_index()

    whole = deltas(train("whole", base))
    train("cut", base)
    checkpoint = tmp_path / "cut/out/checkpoint-2"
    if base_is_there:
        run = train("cut", checkpoint, str(checkpoint))
        assert deltas(run).to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-6)
        return
    base.rename(tmp_path / "gone")
    with pytest.warns(RuntimeWarning, match="is not measured from here on"):
        run = train("cut", checkpoint, str(checkpoint))
    assert not len(deltas(run))
    said = run.events.loc[run.events["event"] == "warning", "message"]
    assert said.str.contains("which the run began with, is not found").any()


def test_attached_in_two_calls_it_is_one_training(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def made(folder: str, *, apart: bool) -> Trainer:
        one = trainer(tmp_path / folder, **settings)
        lisa, record = lt.LisaConfig(1, 1), lt.RecordConfig(str(tmp_path / folder / "run"))
        if apart:
            lt.attach(one, lisa=lisa)
            lt.attach(one, record=record)
        else:
            lt.attach(one, lisa=lisa, record=record)
        return one

    weights = []
    for folder, apart in (("joint", False), ("apart", True)):
        made(folder, apart=apart).train()
        again = made(folder, apart=apart)
        again.train(resume_from_checkpoint=str(tmp_path / folder / "out/checkpoint-2"))
        weights.append(again.model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_what_keeps_a_second_training_from_beginning_is_no_word_on_the_first(
    tmp_path: Path,
) -> None:
    one = trainer(tmp_path, max_steps=2)
    lt.attach(one, record=lt.RecordConfig(str(tmp_path / "run")))
    one.train()
    with pytest.raises(ValueError, match="No valid checkpoint"):
        one.train(resume_from_checkpoint=True)
    assert la.load(tmp_path / "run").status == "finished"


class NoMemory(TrainerCallback):
    """Fails once, at the second step."""

    steps = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    file = tmp_path / "lr.json"
    given = {"schema": "lr-multipliers/1", "multipliers": {"0": 2.0, "1": 0.5, "2": 0.0}}
    file.write_text(json.dumps(given))
    return file


def test_multiplied_rates_outlive_a_retry_and_a_second_training(
    rates: Path, tmp_path: Path
) -> None:
    retried = trainer(tmp_path, max_steps=3, auto_find_batch_size=True, callbacks=[NoMemory()])
    lt.attach(retried, lr_multipliers=rates)
    retried.train()
    assert retried.state.global_step == 3
    assert {group["lr"] for group in retried.optimizer.param_groups} == {1e-2, 2e-2, 5e-3, 0.0}
    twice = trainer(tmp_path, max_steps=2)
    lt.attach(twice, lr_multipliers=rates)
    twice.train()
    twice.train()
    assert {group["lr"] for group in twice.optimizer.param_groups} == {1e-2, 2e-2, 5e-3, 0.0}
    with pytest.raises(ConfigError, match="has lr_multipliers already"):
        lt.attach(twice, lr_multipliers=rates)


def test_a_copy_of_an_attached_trainer_is_refused(tmp_path: Path) -> None:
    """It would train the original."""
    one = trainer(tmp_path, max_steps=1)
    copy.deepcopy(one)
    lt.attach(one, lisa=lt.LisaConfig(1, 1))
    with pytest.raises(ConfigError, match="cannot be copied: the copy would train the original"):
        copy.deepcopy(one)
    one.train()


def test_a_search_for_hyperparameters_is_refused(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=1)
    lt.attach(one, record=lt.RecordConfig(str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="make a trainer for every trial"):
        one.train(resume_from_checkpoint=None, trial={"learning_rate": 1.0})
    assert not (tmp_path / "run").exists()
