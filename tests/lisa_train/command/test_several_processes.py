"""`torchrun --nproc-per-node 2 -m lisa_train`: one run directory that equals one process's.

The processes are those that torchrun would start; torchrun itself starts them in slow tests.
"""

import json
import os
from importlib import resources
from pathlib import Path
from unittest import mock

import helpers_processes
import numpy as np
import pytest
import torch
from helpers_processes import launched, torchrun

import lisa_analysis as la
from lisa_train.command.cli import main
from tests.lisa_train.command.several_processes import dying, process

pytestmark = pytest.mark.processes

COLUMNS = ("weight_norm", "grad_norm", "grad_norm_l1", "update_norm", "descent")
SHARED = [
    "--max_steps=4", "--warmup_steps=0", "--learning_rate=1e-3", "--max_grad_norm=0.5",
    "--record.every=1", "--eval_steps=2", "--trainer_args", '{"adam_epsilon": 1e-4}',
]  # fmt: skip
# name -> the settings of a run; batches are given for one process
RUNS = {
    "lisa": [
        "--config=lisa", *SHARED, "--lisa.interval_steps=2", "--gradient_checkpointing=true",
        "--gradient_accumulation_steps=2", "--record.grad_noise=true", "--save_steps=2",
    ],
    "full": ["--config=full", *SHARED],
    "lora": ["--config=lora", *SHARED],
    "probe": ["--config=probe", "--probe.batches=6"],
}  # fmt: skip
# As accelerate splits the model, with checkpoints in pieces; of two processes alone.
SPLIT = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
IN_PIECES = [*RUNS["lisa"], "--trainer_args", json.dumps({"adam_epsilon": 1e-4, **SPLIT})]
IN_PIECES.remove("--record.grad_noise=true")  # which there is not of pieces


def arguments(name, folder, data, processes):
    batch = 8 // processes
    return [
        *{**RUNS, "split": IN_PIECES}[name], f"--per_device_train_batch_size={batch}",
        f"--per_device_eval_batch_size={batch}", f"--output_dir={folder / name}", *data,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tiny_model_dir, text_file):
    return [f"--model_name_or_path={tiny_model_dir}", f"--dataset_name={text_file}"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, data):
    """Folder of the runs of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    bad = [
        "--config=lisa", "--lisa.activated_layers=99", f"--output_dir={folder / 'bad'}", *data,
    ]  # fmt: skip
    given = [(2, bad), *((0, arguments(name, folder, data, 2)) for name in (*RUNS, "split"))]
    return folder, launched(process, folder, given)


@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """Folder of the same runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        assert main(arguments(name, folder, data, 1)) == 0
    return folder


@pytest.mark.parametrize("name", ["lisa", "full", "lora"])
def test_one_run_directory_that_equals_one_process(two, one, name):
    run, alone = (la.load(folder / name) for folder in (two[0], one))
    assert run.status == alone.status == "finished"
    for column, tolerance in {"loss": 2e-5, "grad_norm": 2e-5, "tokens": 0, "epoch": 0}.items():
        wanted = alone.scalars[column].to_numpy(float)
        found = run.scalars[column].to_numpy(float)
        assert np.isfinite(wanted).any()
        np.testing.assert_allclose(found, wanted, rtol=tolerance, err_msg=column)
    rows, wanted_rows = (
        r.metrics().set_index(["step", "param_id"]).sort_index() for r in (run, alone)
    )
    assert list(rows.index) == list(wanted_rows.index)
    scale = (wanted_rows["grad_norm"] * wanted_rows["update_norm"]).to_numpy()
    for column in COLUMNS:
        found, wanted = rows[column].to_numpy(float), wanted_rows[column].to_numpy(float)
        absolute = 2e-5 * np.nanmax(scale) if column == "descent" else 0
        np.testing.assert_allclose(found, wanted, rtol=3e-5, atol=absolute, err_msg=column)
    result, expected = run.manifest["result"], alone.manifest["result"]
    for key in ("first_held_out_loss", "last_held_out_loss"):
        assert result[key] == pytest.approx(expected[key], rel=2e-5)


def test_a_model_that_accelerate_splits(two, one):
    from transformers import AutoModelForCausalLM

    run, alone = la.load(two[0] / "split"), la.load(one / "lisa")
    assert run.status == "finished"
    for column in ("loss", "grad_norm"):
        wanted = alone.scalars[column].to_numpy(float)
        np.testing.assert_allclose(run.scalars[column].to_numpy(float), wanted, rtol=2e-5)
    assert (two[0] / "split" / "checkpoints" / "checkpoint-2" / "optimizer_0").is_dir()
    models = (folder / "checkpoints" / "final" for folder in (two[0] / "split", one / "lisa"))
    final, wanted = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in models)
    for name, tensor in wanted.items():
        torch.testing.assert_close(final[name], tensor, rtol=2e-5, atol=1e-6)


def test_lisa_draws_and_measures_the_same(two, one):
    run, alone = (la.load(folder / "lisa") for folder in (two[0], one))
    draws, wanted = (
        r.events.query("event == 'lisa_draw'")["layers"].tolist() for r in (run, alone)
    )
    assert [list(a) for a in draws] == [list(b) for b in wanted]
    assert len(draws) == 2
    noise = run.metrics()["grad_noise"]  # two micro-batches each of two processes
    assert noise.notna().any()


def test_a_probe_measures_the_batches_of_both(two, one):
    run, alone = (la.load(folder / "probe") for folder in (two[0], one))
    assert run.manifest["probe"] != {}
    scores, wanted = (la.importance(r).to_frame()["score"].to_numpy() for r in (run, alone))
    assert len(scores) == len(wanted) == 4
    assert (scores > 0).all()


def test_one_process_speaks(two):
    said = "".join(two[1])
    assert said.count("lisa: 4 steps, held-out loss") == 2
    assert said.count("step 4: held-out loss") == 4  # one per training
    of_lisa = said[: said.index("lisa: 4 steps, held-out loss")]
    assert "step 4: held-out loss" in of_lisa
    assert "unused" not in of_lisa  # DDP speaks later, where torch was loaded before the command


def test_a_bad_setting_is_one_sentence_and_no_process_waits(two):
    """All processes return 2 (`several_processes.py` looks), and go on to the next command."""
    folder, texts = two
    said = [line for text in texts for line in text.splitlines() if line.startswith("lisa-train:")]
    assert len(said) == 1, texts
    assert "activated_layers" in said[0]
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("name", "count"), [("1-gpu", 1), ("2-gpus", 2), ("8-gpus", 8), ("8-gpus-fsdp2", 8)]
)
def test_the_files_for_accelerate_are_read_by_it(name, count):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = resources.files("lisa_train.command") / "recipes" / "accelerate"
    file = folder / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == count
    if name.endswith("fsdp2"):
        assert config.distributed_type == "FSDP"
        plugin = fsdp_plugin(file)
        assert plugin.fsdp_version == 2
        assert "SHARDED" in str(plugin.state_dict_type)
        return
    assert config.distributed_type == ("MULTI_GPU" if count > 1 else "NO")


def fsdp_plugin(file):
    """What accelerate makes of a file's settings in the processes that it launches."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    launched, _, _ = _validate_launch_command(given)
    with mock.patch.dict(os.environ):
        os.environ |= prepare_multi_gpu_env(launched)
        return FullyShardedDataParallelPlugin()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lisa", "full"])
def test_torchrun_itself(data, one, tmp_path, name):
    done = torchrun(["-m", "lisa_train", *arguments(name, tmp_path, data, 2)])
    assert done.stdout.count(f"{name}: 4 steps, held-out loss") == 1
    assert "unused" not in done.stdout + done.stderr
    run, alone = (la.load(folder / name) for folder in (tmp_path, one))
    np.testing.assert_allclose(
        run.scalars["loss"].to_numpy(float), alone.scalars["loss"].to_numpy(float), rtol=2e-5
    )


@pytest.mark.parametrize("launcher", ["none", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_run_readably(data, tmp_path, launcher, monkeypatch):
    """Torchrun ends the others; without it they find out by themselves."""
    words = arguments("lisa", tmp_path, data, 2)
    if launcher == "torchrun":
        script = Path(__file__).with_name("several_processes.py")
        torchrun([script, json.dumps([(0, words)]), "3"], fails=True)
    else:
        monkeypatch.setattr(helpers_processes, "_GRACE", 60)  # by itself, however busy the machine
        with pytest.raises(AssertionError, match="process 0 ended with 2, process 1 ended with -9"):
            launched(dying, tmp_path, 3, words)
    run = la.load(tmp_path / "lisa")
    assert run.status == "interrupted"
    assert 2 <= len(run.scalars) <= 3
    assert run.metrics()["step"].max() >= 2
    assert (tmp_path / "lisa" / "checkpoints" / "checkpoint-2").is_dir()
