"""run.json says how a model was trained, whichever door the run came through."""

import json

import pytest
import torch
from helpers_recording import arguments, examples, llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import lisa_train as lt
from lisa_analysis.contract.schema import MANIFEST_FIELDS
from lisa_analysis.rundir.opening import load
from lisa_analysis.views.cli import main as analyze
from lisa_train.command.training import train
from lisa_train.config import TrainConfig
from lisa_train.trainer import RecordCallback

LISA = lt.LisaConfig(activated_layers=3, interval_steps=2, seed=5, always_active=("norm",))
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
# What only a command knows, and what is another in every run.
OF_THE_COMMAND = {
    "dataset",
    "task",
    "command",
    "run_id",
    "created",
    "updated",
    "result",
    "hardware",
}


def by_command(model_dir, data, folder, method):
    settings = {"lisa": LISA} if method == "lisa" else {}
    if method == "lora":
        settings["lora"] = LORA
    config = TrainConfig(
        str(model_dir), str(data), output_dir=str(folder), method=method, max_steps=6, seed=7,
        learning_rate=1e-2, max_length=32, save_final_model=False, eval_size=0, data_seed=9,
        record=lt.RecordConfig(every=1), **settings,
    )  # fmt: skip
    return load(train(config)).manifest


def by_attach(model_dir, data, folder, method):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    from datasets import Dataset

    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(folder / "out"), max_steps=6, seed=7, data_seed=9, use_cpu=True, report_to=[],
            disable_tqdm=True, learning_rate=1e-2, max_length=32, save_strategy="no",
            per_device_train_batch_size=8, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if method == "lora" else None,
    )  # fmt: skip
    lisa = LISA if method == "lisa" else None
    lt.attach(trainer, lisa=lisa, record=lt.RecordConfig(str(folder / "run"), every=1))
    trainer.train()
    return load(folder / "run").manifest


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_both_doors_write_the_same(tiny_model_dir, text_file, tmp_path, method):
    one = by_command(tiny_model_dir, text_file, tmp_path / "command", method)
    other = by_attach(tiny_model_dir, text_file, tmp_path, method)
    assert one["method"] == other["method"] == method
    assert set(one) | OF_THE_COMMAND == set(other) | OF_THE_COMMAND
    assert set(one) <= set(MANIFEST_FIELDS)
    for segment in (*one["segments"], *other["segments"]):
        del segment["started"]
    for name in set(one) - OF_THE_COMMAND:
        assert one[name] == other[name], name
    assert one["seeds"]["seed"] == 7
    assert one["seeds"]["data_seed"] == 9
    assert ("lisa_seed" in one["seeds"]) == (method == "lisa") == ("lisa" in one)
    assert ("lora" in one) == (method == "lora")
    if method == "lora":
        assert {k: one["lora"][k] for k in ("r", "lora_alpha")} == {"r": 4, "lora_alpha": 6}
        assert one["lora"]["target_modules"] == ["q_proj", "v_proj"]
        # What is trained on top is no part of the model.
        whole = by_command(tiny_model_dir, text_file, tmp_path / "full", "full")
        assert one["model"]["parameters"] == whole["model"]["parameters"]


@pytest.mark.parametrize("order", ["lisa first", "record first", "strangers"])
def test_bare_callbacks_write_the_same(tmp_path, order):
    trainer = Trainer(
        llama(layers=4), arguments(tmp_path / "o", max_steps=3), train_dataset=examples()
    )
    engine = lt.LisaCallback(LISA)
    config = lt.RecordConfig(str(tmp_path / "run"))
    known = {} if order == "strangers" else {"lisa": engine}
    recorder = RecordCallback(trainer, config, **known)
    added = [engine, recorder] if order == "lisa first" else [recorder, engine]
    for callback in added:
        trainer.add_callback(callback)
    trainer.train()
    run = load(tmp_path / "run")
    assert_lisa(run)
    assert run.events["event"].tolist() == ["lisa_draw"] * 2


@pytest.mark.parametrize("order", ["engine first", "recorder first"])
def test_a_plain_loop_with_both_writes_the_same(tmp_path, order):
    model = llama(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    config = lt.RecordConfig(str(tmp_path / "run"), every=1)
    if order == "engine first":
        engine = lt.Lisa(model, optimizer, LISA)
        recorder = lt.NormRecorder(model, optimizer, config)
    else:
        recorder = lt.NormRecorder(model, optimizer, config)
        engine = lt.Lisa(model, optimizer, LISA)
    rows = examples(2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with engine, recorder:
        for step in range(3):
            engine.begin_step(step)
            model(**batch).loss.backward()
            recorder.before_step(step + 1)
            optimizer.step()
            recorder.after_step(step + 1)
            optimizer.zero_grad()
    assert_lisa(load(tmp_path / "run"))
    # An engine that is closed trains nothing any more.
    with lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path / "next"))):
        pass
    assert load(tmp_path / "next").method == "full"


def assert_lisa(run):
    assert run.method == "lisa"
    assert run.manifest["lisa"]["activated_layers"] == 3
    assert run.manifest["lisa"]["always_active"] == ["norm"]
    assert run.manifest["seeds"]["lisa_seed"] == 5


def test_a_word_of_the_user_stands(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    config = lt.RecordConfig(str(tmp_path / "run"))
    own = {"method": "mine", "seeds": {"seed": 3}}
    with (
        lt.Lisa(model, optimizer, LISA),
        lt.NormRecorder(model, optimizer, config, manifest=own),
    ):
        pass
    run = load(tmp_path / "run")
    assert run.method == "mine"
    assert run.manifest["seeds"] == {"seed": 3, "lisa_seed": 5}


def test_the_analysis_plans_for_the_layers_that_were_trained(tmp_path, capsys):
    trainer = Trainer(
        llama(layers=4), arguments(tmp_path / "o", max_steps=8), train_dataset=examples()
    )
    lt.attach(trainer, lisa=LISA, record=lt.RecordConfig(str(tmp_path / "run"), every=1))
    trainer.train()
    path = tmp_path / "p.json"
    assert analyze([str(tmp_path / "run"), "--probabilities", str(path)]) == 0
    capsys.readouterr()
    assert sum(json.loads(path.read_text())["inclusion_probabilities"]) == pytest.approx(3)


def test_adapters_of_other_kinds_are_named(tmp_path):
    from peft import IA3Config

    model = get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    config = lt.RecordConfig(str(tmp_path / "run"))
    with pytest.warns(RuntimeWarning, match="IA3"), lt.NormRecorder(model, optimizer, config):
        pass
    run = load(tmp_path / "run")
    assert (run.method, run.manifest["peft"]["peft_type"]) == ("peft", "IA3")
