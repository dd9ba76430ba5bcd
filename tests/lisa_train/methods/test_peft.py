"""`method: peft`: types of PEFT through `lisa-train`: what trains, rests, is saved and goes on."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main
from lisa_train.command.training import train
from lisa_train.methods.peft import any_peft_config, type_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore:.*delta_norm.*")

TARGETS = ["q_proj", "v_proj", "down_proj"]
# Type as a person may write it -> its settings, for a Llama of hidden size 32.
TYPES: dict[str, dict[str, Any]] = {
    "ia3": {},
    "ln_tuning": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "loha": {"r": 4, "target_modules": TARGETS},
    "lokr": {"r": 4, "target_modules": TARGETS},
    "oft": {"oft_block_size": 4, "r": 0, "target_modules": TARGETS},
    "boft": {"boft_block_size": 4, "target_modules": TARGETS},
    "vera": {"r": 4, "target_modules": ["q_proj"]},
    "hra": {"r": 4, "target_modules": TARGETS},
    "fourierft": {"n_frequency": 10, "target_modules": TARGETS, "scaling": 100.0},
    "road": {"group_size": 4, "target_modules": TARGETS},
    "prompt-tuning": {"num_virtual_tokens": 4},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1,
                "target_modules": TARGETS},
}  # fmt: skip
# Those whose checkpoints hold less than the training goes on from are refused, see below.
GOES_ON = tuple(kind for kind in TYPES if kind not in ("p-tuning", "adalora"))
ESTIMATED = ("ia3", "oft", "vera", "prompt-tuning", "prefix-tuning")


def settings(model: Path, data: Path, out: Path, kind: str, **more: Any) -> lt.TrainConfig:
    given: dict[str, Any] = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_length": 32,
        "eval_size": 0, "record": lt.RecordConfig(every=1), "progress_bar": False,
    }  # fmt: skip
    return lt.TrainConfig(
        str(model), str(data), "peft", str(out), peft={"peft_type": kind, **TYPES[kind]},
        **{**given, **more},
    )  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_the_adapter_learns_and_the_model_keeps_its_bits(
    kind: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from lisa_train.command.training import PreparedRun

    seen: dict[str, Any] = {}
    original = PreparedRun.train

    def watched(prepared: PreparedRun) -> None:
        model: Any = prepared.trainer.model
        rest = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        before = {n: p.detach().clone() for n, p in rest.items()}
        original(prepared)
        seen["same"] = all(torch.equal(p, before[n]) for n, p in rest.items())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        seen["norms"] = {n: float(p.detach().double().norm()) for n, p in trained.items()}
        seen["sizes"] = sum(p.numel() for p in trained.values())

    monkeypatch.setattr(PreparedRun, "train", watched)
    more = {"eval_size": 16, "save_steps": 4} | ({"learning_rate": 0.5} if kind == "vera" else {})
    config = settings(tiny_model_dir, text_file, tmp_path / "run", kind, **more)
    run = la.load(train(config))
    assert seen["same"]
    result = run.manifest["result"]
    assert result["last_held_out_loss"] < result["first_held_out_loss"] - 1e-3
    assert (run.method, run.status, run.n_layers) == ("peft", "finished", 4)
    assert run.manifest["peft"]["peft_type"] == kind.upper().replace("-", "_")
    names = run.parameters.set_index("param_id")["name"]
    rows = run.metrics(["weight_norm", "grad_norm"])
    steps = rows[rows["grad_norm"].notna()]
    assert set(steps["param_id"].map(names)) == set(seen["norms"])
    last = rows[rows["step"] == 8].set_index("param_id")["weight_norm"].rename(index=names)
    for name, norm in seen["norms"].items():
        assert last[name] == pytest.approx(norm, rel=1e-5), name
    assert (run.path / "adapter" / "adapter_config.json").exists()
    kept = yaml.safe_load((run.path / "config.yaml").read_text())
    assert kept["peft"]["peft_type"] == kind
    if kind in ESTIMATED:
        assert_its_memory_is_that_of_its_tensors(config, seen["sizes"])
    if kind in GOES_ON:
        assert_a_resumed_run_equals_the_uninterrupted_one(config, run)
    if kind == "adalora":
        assert_ranks_were_taken_away(run.path)


def assert_its_memory_is_that_of_its_tensors(config: lt.TrainConfig, trained: int) -> None:
    found = lt.estimate_memory(
        config.model_name_or_path, "peft", sequence_length=16, optim="sgd", peft=config.peft
    )
    assert found.trainable == trained
    assert found.fullest.gradients == 4 * trained


def assert_a_resumed_run_equals_the_uninterrupted_one(config: lt.TrainConfig, run: Any) -> None:
    def logged(run: Any) -> tuple[list[float], np.ndarray]:
        rows = run.metrics(["weight_norm", "grad_norm", "update_norm"], steps=[5, 6, 7, 8])
        return (
            run.scalars["loss"].dropna().tolist(),
            rows.sort_values(["step", "param_id"]).to_numpy(float),
        )

    losses, norms = logged(run)
    shutil.rmtree(run.path / "checkpoints" / "checkpoint-8")
    resumed = la.load(train(config, resume=True))
    assert resumed.manifest["segment"] == 1
    again = logged(resumed)
    assert again[0] == losses
    assert np.array_equal(again[1], norms, equal_nan=True)


def assert_ranks_were_taken_away(run: Path) -> None:
    from safetensors.numpy import load_file

    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    ranks = [v.shape[0] for n, v in saved.items() if "lora_E" in n]
    assert sum(ranks) == 2 * len(ranks)  # target_r on average, from init_r 4


@pytest.mark.parametrize("kind", ["p-tuning", "adalora"])
def test_what_a_checkpoint_does_not_hold_is_no_start(
    kind: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, text_file, tmp_path / "a", kind, max_steps=2, save_steps=1)
    with pytest.raises(ConfigError, match=r"cannot be resumed: its checkpoints do not hold"):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "peft.peft_type names no type"),
        ({"peft_type": "lora", "r": 2}, "LORA has a method of its own: set method to lora"),
        ({"peft_type": "poly"}, "POLY needs the number of a task"),
        ({"peft_type": "ia4"}, "'ia4', which the installed PEFT does not have.*Did you mean 'IA3'"),
        ({"peft_type": "ia3", "target_module": ["q"]}, "Did you mean 'target_modules'"),
        ({"peft_type": "ia3", "r": 4}, "peft.r is not a field of PEFT's IA3Config"),
        ({"peft_type": "ia3", "inference_mode": True}, "inference_mode is not a field"),
        ({"peft_type": "adalora", "init_r": 4, "tinit": 10, "tfinal": 10}, "refuses the settings"),
        ({"peft_type": "prefix_tuning"}, "PREFIX_TUNING needs peft.num_virtual_tokens"),
        ({"peft_type": "adaption-prompt"}, "needs peft.adapter_len"),
        ({"peft_type": "ia3", "task_type": "SEQ_CLS"}, "of this run it is CAUSAL_LM"),
        (
            {"peft_type": "loha", "target_modules": ["q_proj", "v_porj"]},
            "peft.target_modules holds 'v_porj'.*Did you mean 'v_proj'",
        ),
        ({"peft_type": "ia3", "target_modules": ["nowhere"], "feedforward_modules": []}, "nowhere"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(
    given: dict[str, Any], expected: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        train(
            lt.TrainConfig(
                str(tiny_model_dir),
                str(text_file),
                "peft",
                str(tmp_path / "run"),
                max_steps=5,
                peft=given,
                max_length=32,
            )
        )
    assert not (tmp_path / "run").exists()


def test_other_methods_leave_its_settings_alone() -> None:
    with pytest.raises(ConfigError, match=r"peft.peft_type is set but method is 'full'"):
        lt.TrainConfig("m", "d", "full", peft={"peft_type": "ia3"})
    assert type_of({"peft_type": "Prefix-Tuning"}) == "PREFIX_TUNING"
    config = any_peft_config({"peft_type": "adalora", "tinit": 1, "tfinal": 1}, "CAUSAL_LM", 8)
    assert (config.total_step, config.task_type) == (8, "CAUSAL_LM")


def test_the_recipe_trains(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["--config", "peft", "--model_name_or_path", str(tiny_model_dir), "--dataset_name",
             str(text_file), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    assert la.load(tmp_path / "run").manifest["peft"]["peft_type"] == "IA3"
