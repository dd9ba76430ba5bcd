"""Whole training runs on a tiny model: every method, layout and precision; what lands on disk."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lisa_analysis as la
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.command.cli import main, parse
from lisa_train.command.output import last_checkpoint
from lisa_train.command.training import _command, summary, train, trainer_arguments
from lisa_train.config import LearnConfig, LisaConfig, RecordConfig, TrainConfig

FAST: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_length": 32,
    "eval_steps": 3,
    "record": RecordConfig(every=1),
    "save_final_model": False,
}
LISA = LisaConfig(activated_layers=1, interval_steps=2)


def config(model: Path, data: Path, out: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(str(model), str(data), output_dir=str(out), **{**FAST, **settings})


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_every_method_trains_and_leaves_a_complete_run_directory(
    method: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"lisa": LISA} if method == "lisa" else {}
    run_dir = train(
        config(
            tiny_model_dir,
            text_file,
            tmp_path / "run",
            method=method,
            save_final_model=True,
            **extra,
        )
    )
    run = la.load(run_dir)
    assert (run.status, run.method, run.n_layers) == ("finished", method, 4)
    scalars = run.scalars
    assert list(scalars["step"]) == [1, 2, 3, 4, 5, 6]
    assert scalars["loss"].iloc[-1] < scalars["loss"].iloc[0]
    metrics = run.metrics(columns=["weight_norm", "grad_norm", "update_norm", "delta_norm"])
    trained = metrics[(metrics["step"] > 0) & metrics["grad_norm"].notna()]
    assert set(trained["step"]) == {1, 2, 3, 4, 5, 6}
    assert (trained["update_norm"] > 0).any()
    assert trained["weight_norm"].notna().all()
    roles = run.parameters.set_index("param_id")["role"]
    if method == "lora":
        learned = trained[trained["param_id"].map(roles) == "lora_B"]
        assert (learned.loc[learned["step"] == 6, "delta_norm"] > 0).all()
    evaluations = run.events[run.events["event"] == "evaluate"]
    assert list(evaluations["step"]) == [0, 3, 6]
    saved = run_dir / ("adapter/adapter_config.json" if method == "lora" else "checkpoints/final")
    assert saved.exists()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["method"] == method


def test_lisa_logs_its_draws_and_only_drawn_layers_train(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = la.load(
        train(config(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=LISA))
    )
    draws = run.events[run.events["event"] == "lisa_draw"]
    assert list(draws["step"]) == [0, 2, 4]
    layer_of = run.parameters.set_index("param_id")["layer"]
    metrics = run.metrics(columns=["grad_norm"])
    metrics = metrics[metrics["grad_norm"].notna() & (metrics["step"] > 0)]
    for _, draw in draws.iterrows():
        inside = metrics[metrics["step"].between(draw["step"] + 1, draw["step"] + 2)]
        layers = set(inside["param_id"].map(layer_of).dropna().astype(int))
        assert layers == set(draw["layers"])
        assert sum(draw["inclusion_probabilities"]) == pytest.approx(1)
        active = run.parameters[run.parameters["tied_to"].isna()]
        inside = active["layer"].isna() | active["layer"].isin(draw["layers"])
        share = active.loc[inside, "numel"].sum() / active["numel"].sum()
        assert draw["trainable_share"] == pytest.approx(share)
    # AdamW's two moments of embeddings (tied) and norm, which stay, and a count of four bytes each.
    outside = active[active["layer"].isna()]
    held = int(8 * outside["numel"].sum()) + 4 * len(outside)
    assert list(draws["state_bytes"]) == [0, held, held]
    result = run.manifest["result"]
    visits = np.bincount([i for layers in draws["layers"] for i in layers], minlength=4).tolist()
    assert result["layer_visits"] == visits
    assert result["layers_never_drawn"] == [i for i in range(4) if not visits[i]]
    missed = result["layers_never_drawn"]
    words = f"{len(missed)} of 4 layers never drawn ({', '.join(map(str, missed))})."
    assert missed
    assert words in summary(run.path)


def test_the_lean_recipe_trains_two_layers_in_fp32_and_returns_bf16(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Every option that saves memory at once, as `--config lisa-lean` combines them."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    code = main([
        "--config", "lisa-lean", "--model_name_or_path", str(tiny_model_dir), "--dataset_name",
        str(text_file), "--output_dir", str(out), "--max_steps", "8", "--lisa.interval_steps", "4",
        "--warmup_steps", "0", "--learning_rate", "1e-2", "--record.every", "1",
        "--progress_bar", "false",
    ])  # fmt: skip
    assert code == 0
    run = la.load(out)
    assert run.status == "finished"
    layer_of = run.parameters.set_index("param_id")["layer"]
    metrics = run.metrics(columns=["grad_norm", "update_norm"])
    trained = metrics[metrics["grad_norm"].notna()]
    assert (trained["update_norm"] > 0).all()
    draws = run.events[run.events["event"] == "lisa_draw"]
    assert list(draws["step"]) == [0, 4]
    for _, draw in draws.iterrows():
        inside = trained[trained["step"].between(draw["step"] + 1, draw["step"] + 4)]
        assert set(inside["param_id"].map(layer_of)) == set(draw["layers"])
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "final", dtype="auto")
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}


@pytest.mark.parametrize("layout", ["completion", "chat", "chat-last-turn", "packed"])
def test_every_layout_trains(
    layout: str,
    tiny_model_dir: Path,
    text_file: Path,
    completion_file: Path,
    chat_file: Path,
    tmp_path: Path,
) -> None:
    data = {"completion": completion_file, "packed": text_file}.get(layout, chat_file)
    extra: dict[str, Any] = {
        "chat-last-turn": {"completion_only_loss": True, "max_length": 64},
        "packed": {"packing": True},
    }.get(layout, {})
    run_dir = train(
        config(tiny_model_dir, data, tmp_path / "run", method="full", max_steps=2, **extra)
    )
    assert la.load(run_dir).scalars["loss"].notna().all()


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}, {"dtype": "bfloat16"}])
def test_lower_precision_trains(
    precision: dict[str, Any], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run_dir = train(
        config(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=LISA, **precision)
    )
    run = la.load(run_dir)
    expected = precision.get("dtype", "float32")
    assert set(run.parameters["dtype"]) == {expected}
    assert run.status == "finished"


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_the_kept_configuration_repeats_the_run(
    method: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"lisa": LISA} if method == "lisa" else {}
    first = train(config(tiny_model_dir, text_file, tmp_path / "a", method=method, **extra))
    words = ["--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "b")]
    assert main(words) == 0
    losses = [list(la.load(tmp_path / name).scalars["loss"]) for name in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["lora", "lisa"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    method: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"lisa": LISA} if method == "lisa" else {}
    settings = {"method": method, "save_steps": 3, **extra}
    whole = la.load(train(config(tiny_model_dir, text_file, tmp_path / "a", **settings)))
    part = config(tiny_model_dir, text_file, tmp_path / "b", **settings)
    train(part)
    _rewind(tmp_path / "b", to_step=3)
    resumed = la.load(train(part, resume=True))
    assert list(resumed.scalars["loss"]) == list(whole.scalars["loss"])
    assert list(resumed.scalars["step"]) == [1, 2, 3, 4, 5, 6]
    columns = ["weight_norm", "grad_norm", "update_norm"]
    frames = [
        run.metrics(columns=columns, steps=slice(1, 7)).sort_values(["step", "param_id"])
        for run in (whole, resumed)
    ]
    assert frames[0].reset_index(drop=True).equals(frames[1].reset_index(drop=True))


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model_dir, text_file, tmp_path / "r", method="lisa", lisa=LISA,
                      save_steps=2)  # fmt: skip
    whole = list(la.load(train(settings)).scalars["loss"])
    state = tmp_path / "r" / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_checkpoint(tmp_path / "r").name == "checkpoint-4"
    resumed = la.load(train(settings, resume=True))
    assert list(resumed.scalars["loss"]) == whole
    assert resumed.events.query("event == 'resume'")["step"].tolist() == [4]


def _rewind(run_dir: Path, *, to_step: int) -> None:
    """Leave a run as a kill after `to_step` would: later checkpoints gone, status running."""
    import shutil

    for folder in (run_dir / "checkpoints").glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > to_step:
            shutil.rmtree(folder)
    manifest = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**manifest, "status": "running"}))


def test_probabilities_go_round_the_loop(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    pilot = train(config(tiny_model_dir, text_file, tmp_path / "pilot", method="lora"))
    path = tmp_path / "probabilities.json"
    la.sampling_probabilities(la.importance(la.load(pilot)), activated_layers=2).save(path)
    lisa = dataclasses.replace(LISA, activated_layers=2, probabilities=str(path))
    run_dir = train(config(tiny_model_dir, text_file, tmp_path / "l", method="lisa", lisa=lisa))
    draws = la.load(run_dir).events.query("event == 'lisa_draw'")
    expected = json.loads(path.read_text())["inclusion_probabilities"]
    assert draws["inclusion_probabilities"].iloc[0] == pytest.approx(expected)
    path.unlink()  # the run keeps its own copy
    words = ["--config", str(run_dir / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(words) == 0


def write_multipliers(path: Path, *rates: float) -> Path:
    multipliers = {str(layer): rate for layer, rate in enumerate(rates)}
    path.write_text(json.dumps({"schema": "lr-multipliers/1", "multipliers": multipliers}))
    return path


def test_multipliers_are_kept_in_the_run(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """What lies at the path by the time of a repetition, or of a continuation, is not believed."""
    path = write_multipliers(tmp_path / "lr.json", 0.0, 1.0, 2.0, 1.0)
    settings = config(tiny_model_dir, text_file, tmp_path / "a", method="full", save_steps=3,
                      lr_multipliers=str(path))  # fmt: skip
    run_dir = train(settings)
    kept = run_dir / "lr_multipliers.json"
    assert kept.read_bytes() == path.read_bytes()
    assert parse(["--config", str(run_dir / "config.yaml")]).config.lr_multipliers == str(kept)
    _rewind(run_dir, to_step=3)
    write_multipliers(path, 1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ConfigError, match=r"lr\.json is not the file that the run to resume began"):
        train(settings, resume=True)
    path.unlink()
    words = ["--config", str(run_dir / "config.yaml")]
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--output_dir", str(tmp_path / "b")]) == 0
    losses = [list(la.load(tmp_path / name).scalars["loss"]) for name in "ab"]
    assert losses[0] == losses[1]


def test_multipliers_of_another_model_leave_no_trace(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    path = write_multipliers(tmp_path / "lr.json", 1.0, 2.0)
    settings = config(tiny_model_dir, text_file, tmp_path / "run", method="full",
                      lr_multipliers=str(path))  # fmt: skip
    with pytest.raises(ConfigError, match="was made for 2 layers"):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_a_prior_to_learn_from_is_kept_in_the_run(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    pilot = train(config(tiny_model_dir, text_file, tmp_path / "pilot", method="lora"))
    path = tmp_path / "probabilities.json"
    la.sampling_probabilities(la.importance(la.load(pilot)), activated_layers=1).save(path)
    lisa = dataclasses.replace(LISA, sampling="balanced", learn=LearnConfig(prior=str(path)))
    run_dir = train(config(tiny_model_dir, text_file, tmp_path / "l", method="lisa", lisa=lisa))
    kept = run_dir / "learn_prior.json"
    assert kept.read_bytes() == path.read_bytes()
    written = parse(["--config", str(run_dir / "config.yaml")]).config
    assert written.lisa.learn is not None
    assert written.lisa.learn.prior == str(kept)


def test_probabilities_of_another_model_are_refused_before_anything_is_written(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    pilot = train(config(tiny_model_dir, text_file, tmp_path / "pilot", method="lora"))
    path = tmp_path / "probabilities.json"
    la.sampling_probabilities(la.importance(la.load(pilot)), activated_layers=2).save(path)
    content = json.loads(path.read_text())
    content["layer_names"] = [name.replace("model.", "other.") for name in content["layer_names"]]
    path.write_text(json.dumps(content))
    lisa = dataclasses.replace(LISA, activated_layers=2, probabilities=str(path))
    with pytest.raises(ValueError, match=r"other\.layers\.0"):
        train(config(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=lisa))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model_name_or_path", "./nowhere"], "is not a folder"),
        (["--model_name_or_path", "nobody/nothing"], "cannot be read"),
        (["--dataset_name", "gone.jsonl"], "does not exist"),
        (["--lora.rank", "3", "--method", "lora"], "lora.rank is not a field"),
        (["--trainer_args.adam_beta", "0.9"], "Did you mean 'adam_beta"),
        (["--lr_scheduler_type", "cosin"], "refuses these settings"),
        (["--report_to", "[comet_ml]"], "comet-ml"),
        (["--report_to", "[tensorbord]"], "tensorbord"),
        (["--method", "lisa", "--lisa.activated_layers", "9"], "9"),
        (["--method", "lisa", "--lisa.probabilities", "gone.json"], "gone.json"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: list[str],
    expected: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    base = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(text_file),
            "--method", "full", "--max_steps", "2", "--output_dir", str(out)]  # fmt: skip
    assert main([*base, *words]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("lisa-train:")
    ]
    assert len(lines) == 1
    assert expected in lines[0]
    assert not out.exists()


def test_an_output_directory_with_a_run_is_left_alone(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model_dir, text_file, tmp_path / "run", method="full", max_steps=1)
    train(settings)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        train(settings)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resume_refuses_other_settings_and_missing_checkpoints(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model_dir, text_file, tmp_path / "run", method="full", max_steps=1)
    train(settings)
    with pytest.raises(RunDirectoryError, match="no checkpoint to resume from"):
        train(settings, resume=True)
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        train(dataclasses.replace(settings, output_dir=str(tmp_path / "none")), resume=True)
    kept = dataclasses.replace(settings, output_dir=str(tmp_path / "kept"), save_steps=1)
    train(kept)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.5"):
        train(dataclasses.replace(kept, learning_rate=0.5), resume=True)
    with pytest.raises(RunDirectoryError, match="has made all its 1 steps"):
        train(kept, resume=True)
    assert list(la.load(tmp_path / "kept").scalars["step"]) == [1]


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_gradient_checkpointing_changes_nothing_but_memory(
    method: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {"lisa": LISA} if method == "lisa" else {}
    losses = []
    for on in (False, True):
        out = tmp_path / str(on)
        settings = config(
            tiny_model_dir, text_file, out, method=method, gradient_checkpointing=on, **extra
        )
        losses.append(list(la.load(train(settings)).scalars["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulation_and_schedules_reach_the_trainer(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Half the batch twice is the whole batch; the logged rates are the cosine's."""
    settings = {"method": "full", "lr_scheduler_type": "cosine", "eval_steps": None}
    whole = config(tiny_model_dir, text_file, tmp_path / "a", **settings)
    halves = config(
        tiny_model_dir, text_file, tmp_path / "b", **settings,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    a, b = (la.load(train(c)).scalars for c in (whole, halves))
    assert list(a["loss"]) == pytest.approx(list(b["loss"]), rel=1e-4)
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert list(a["learning_rate"]) == pytest.approx(expected)


def test_trackers_are_passed_through(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    settings = config(
        tiny_model_dir, text_file, tmp_path, method="full", report_to=("tensorboard", "trackio")
    )
    assert trainer_arguments(settings, tmp_path).report_to == ["tensorboard", "trackio"]


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=LISA))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
    assert next(x for x in lines if "held-out loss" in x).startswith("step 0: held-out loss")
    last = next(x for x in reversed(lines) if "left" in x)
    draws = la.load(tmp_path / "run").events.query("event == 'lisa_draw'")["layers"]
    assert last.startswith("step 6/6, loss ")
    assert f"layers {','.join(map(str, draws.iloc[-1]))}, 0 s left" in last


def test_progress_is_a_bar_when_asked_for(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(
        tiny_model_dir, text_file, tmp_path / "run", method="lisa", lisa=LISA, progress_bar=True
    )
    train(settings)
    written = capsys.readouterr()
    assert "6/6" in written.err
    assert "layers=" in written.err
    assert "held-out loss" in written.out + written.err


def test_the_command_line_repeats_what_python_does(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["--config", "lisa", "--model_name_or_path", str(tiny_model_dir),
             "--dataset_name", str(text_file), "--record.every", "3"]  # fmt: skip
    command = parse(words)
    assert command.config.record.every == 3
    assert command.config.lisa.activated_layers == 2


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/env/bin/lisa-train", "--config", "lora"], "lisa-train --config lora"),
        (["/src/lisa_train/__main__.py", "--help"], "lisa-train --help"),
        (["/env/ipykernel_launcher.py", "-f", "/tmp/kernel.json"], None),
        ([""], None),
    ],
)
def test_only_a_command_line_of_ours_is_recorded(argv, command, monkeypatch):
    monkeypatch.setattr("sys.argv", argv)
    assert _command() == command
