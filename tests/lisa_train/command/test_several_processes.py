"""`torchrun --nproc-per-node 2 -m lisa_train`: one run directory that equals one process's."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from helpers_processes import torchrun

import lisa_analysis as la
from lisa_train.command.cli import main

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


def arguments(name, folder, data, processes):
    batch = 8 // processes
    return [
        *RUNS[name], f"--per_device_train_batch_size={batch}",
        f"--per_device_eval_batch_size={batch}", f"--output_dir={folder / name}", *data,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tiny_model_dir, text_file):
    return [f"--model_name_or_path={tiny_model_dir}", f"--dataset_name={text_file}"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, data):
    """Folder of the runs of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    given = json.dumps([arguments(name, folder, data, 2) for name in RUNS])
    return folder, torchrun([Path(__file__).with_name("several_processes.py"), given])


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
    said = two[1].stdout + two[1].stderr
    assert said.count("lisa: 4 steps, held-out loss") == 1
    assert said.count("step 4: held-out loss") == 3  # one per training
    for words in ("find_unused_parameters", "unused parameters"):
        assert words not in said


def test_a_bad_setting_is_one_sentence_and_no_process_waits(data, tmp_path):
    done = torchrun(
        ["-m", "lisa_train", "--config=lisa", "--lisa.activated_layers=99",
         f"--output_dir={tmp_path / 'run'}", *data],
        fails=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("lisa-train:")]
    assert len(said) == 1, done.stderr
    assert "activated_layers" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "count"), [("1-gpu", 1), ("2-gpus", 2), ("8-gpus", 8)])
def test_the_files_for_accelerate_are_read_by_it(name, count):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = resources.files("lisa_train.command") / "recipes" / "accelerate"
    config = load_config_from_file(str(folder / f"{name}.yaml"))
    assert config.num_processes == count
    assert config.distributed_type == ("MULTI_GPU" if count > 1 else "NO")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_readably(data, tmp_path):
    words = arguments("lisa", tmp_path, data, 2)
    script = Path(__file__).with_name("several_processes.py")
    torchrun([script, json.dumps([words]), "3"], fails=True)
    run = la.load(tmp_path / "lisa")
    assert run.status == "interrupted"
    assert 2 <= len(run.scalars) <= 3
    assert run.metrics()["step"].max() >= 2
    assert (tmp_path / "lisa" / "checkpoints" / "checkpoint-2").is_dir()
