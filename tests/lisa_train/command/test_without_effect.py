"""Settings that would be ignored beside others are refused when a run begins, never later."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main
from lisa_train.command.without_effect import refuse_without_effect, said_of_optim_args


def check(method: str = "full", **settings: Any) -> None:
    refuse_without_effect(lt.TrainConfig("m", "d", method, **settings))


@pytest.mark.parametrize(("settings", "words"), [
    ({"lr_scheduler_type": "constant", "warmup_steps": 0.03}, "warmup_steps is 0.03 but lr_sch"),
    ({"lr_scheduler_type": "greedy", "warmup_steps": 5}, "warmup_steps is 5 but lr_sched"),
    ({"record": lt.RecordConfig(grad_noise=True)}, "grad_noise is true, but a step has one micro"),
    ({"save_total_limit": 2}, "save_total_limit is 2 but save_steps is null"),
    ({"record": lt.RecordConfig(report_layers=True)}, "report_to names no tracker"),
])  # fmt: skip
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(**settings)
    check("probe", **settings)  # which says it in a note, with all else that it does not use


@pytest.mark.parametrize("method", ["full", "probe"])
@pytest.mark.parametrize(("settings", "words"), [
    ({"model_revision": "main"}, "model_revision is main but model_name_or_path .* is a folder"),
    ({"dataset_config": "en"}, "dataset_config is en but dataset_name .* is a file"),
    ({"trainer_args": {"resume_from_checkpoint": "x"}}, "has no effect here: .*--resume"),
    ({"trainer_args": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "dtype, .* of their own"),
    ({"trainer_args": {"do_train": False}}, "trainer_args.do_train has no effect"),
    ({"trainer_args": {"do_eval": True}}, "evaluations follow eval_steps"),
])  # fmt: skip
def test_what_says_something_of_other_inputs_is_refused(
    settings: dict[str, Any], words: str, method: str, tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=words):
        refuse_without_effect(lt.TrainConfig(str(tmp_path), str(data), method, **settings))
    if "trainer_args" not in settings:  # a hub id has both
        check(method, **settings)


@pytest.mark.parametrize(("optim", "given", "unread"), [
    ("adamw_torch_fused", "beta1=0.5, beta2=0.9", ["beta1=0.5", "beta2=0.9"]),
    ("rmsprop", "alpha=0.5,beta1=0.3", ["beta1=0.3"]),
    ("adamw_torch", None, []),
    ("rmsprop", "alpha", []),
])  # fmt: skip
def test_arguments_that_an_optimizer_does_not_read_are_said(
    optim: str, given: str | None, unread: list[str], tmp_path: Path
) -> None:
    arguments = TrainingArguments(str(tmp_path), optim=optim, optim_args=given, use_cpu=True)
    assert said_of_optim_args(arguments) == [
        f"optim_args {pair} changes nothing of optim {optim}" for pair in unread
    ]
    assert arguments.optim_args == given


@pytest.mark.parametrize("settings", [
    {"lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
    {"lr_scheduler_type": "constant", "warmup_steps": 5, "optim": "schedule_free_adamw"},
    {"save_total_limit": 2, "save_steps": 5},
    {"record": lt.RecordConfig(grad_noise=True), "gradient_accumulation_steps": 2},
    {"record": lt.RecordConfig(report_layers=True), "report_to": "tensorboard"},
])  # fmt: skip
def test_what_has_an_effect_is_taken(settings: dict[str, Any]) -> None:
    check(**settings)


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_warms_up_or_is_refused(schedule: str) -> None:
    """One that warms up begins at less than the rate; what it needs beside that is given."""
    more: dict[str, Any] = {"cosine_with_min_lr": {"min_lr": 0.0},
                            "cosine_warmup_with_min_lr": {"min_lr": 0.0},
                            "warmup_stable_decay": {"num_decay_steps": 1}}  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, 5, 10, more.get(schedule))
    assert scheduler is not None
    if optimizer.param_groups[0]["lr"] < 1.0:
        check(lr_scheduler_type=schedule, warmup_steps=5)
        return
    with pytest.raises(ConfigError, match="does not warm up"):
        check(lr_scheduler_type=schedule, warmup_steps=5)


def test_a_recipe_with_another_schedule_says_what_to_do_and_writes_nothing(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "full", "--model_name_or_path", str(tiny_model_dir), "--dataset_name",
             str(text_file), "--output_dir", str(tmp_path / "run"),
             "--lr_scheduler_type", "constant"]  # fmt: skip
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "warmup_steps is 0.03 but lr_scheduler_type is constant" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
