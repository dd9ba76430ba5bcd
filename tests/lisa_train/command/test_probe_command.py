"""`method: probe` from the shell and from Python: what it measures, writes, says and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers_processes import launched

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main, parse
from lisa_train.command.training import train
from tests.lisa_train.command.several_processes import process


def config(model: Path, data: Path, out: Path, **settings: Any) -> lt.TrainConfig:
    given = {
        "per_device_train_batch_size": 4, "max_length": 32, "probe": lt.ProbeConfig(6), **settings
    }  # fmt: skip
    return lt.TrainConfig(str(model), str(data), "probe", str(out), **given)


def rows(run_dir: Path) -> Any:
    return pq.read_table(run_dir / "probes").to_pandas()


def test_the_shell_measures_and_says_what_comes_next(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    before = (tiny_model_dir / "model.safetensors").read_bytes()
    code = main([
        "--config", "probe", "--model_name_or_path", str(tiny_model_dir), "--dataset_name",
        str(text_file), "--output_dir", str(out), "--probe.batches", "6", "--probe.until", "1e-9",
        "--per_device_train_batch_size", "4", "--progress_bar", "false",
    ])  # fmt: skip
    assert code == 0
    said = capsys.readouterr().out.splitlines()
    run = la.load(out)
    result = run.manifest["result"]
    assert (run.method, run.status, result["batches"]) == ("probe", "finished", 6)
    assert said == [
        f"probe: 6 batches measured, {result['tokens']} tokens, mean loss {result['loss']:.4f}.",
        f"Run directory: {out}",
        f"Next: lisa-analyze {out}",
    ]
    found = rows(out)
    assert sorted(found["batch"].dropna().unique()) == list(range(6))
    tensors = run.parameters[run.parameters["tied_to"].isna()]
    assert set(found["param_id"]) == set(tensors["param_id"])
    assert run.manifest["probe"]["until"] == 1e-9
    assert run.manifest["probe"]["mode"] == "train"
    assert run.manifest["seeds"] == {"seed": 42, "data_seed": 42}
    assert run.manifest["model"]["architecture"] == "LlamaForCausalLM"
    dataset = run.manifest["dataset"]
    assert (dataset["layout"], dataset["train_examples"]) == ("text", 76)
    # Nothing was trained, and nothing looks as if it had been.
    assert run.scalars.empty
    assert not any((out / "checkpoints").iterdir())
    assert not (out / "adapter").exists()
    assert (tiny_model_dir / "model.safetensors").read_bytes() == before


def test_gradients_are_those_of_the_training_loss(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd in float64 on the batches that were measured."""
    from transformers import AutoModelForCausalLM

    from lisa_train.measure.probe import probing as module

    seen: list[dict[str, torch.Tensor]] = []
    one = module._one

    def spy(model: Any, batch: Any, taken: Any, loss: Any) -> None:
        seen.append({k: v.clone() for k, v in batch.items() if torch.is_tensor(v)})
        one(model, batch, taken, loss)

    monkeypatch.setattr(module, "_one", spy)
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "run")))
    found = rows(run.path)
    names = run.parameters.set_index("param_id")["name"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    losses = []
    for number, batch in enumerate(seen):
        model.zero_grad()
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        losses.append(float(loss.detach()))
        expected = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
        measured = found[found["batch"] == number].set_index("param_id")["grad_norm"]
        for param_id, value in measured.items():
            assert value == pytest.approx(expected[names[param_id]], rel=2e-5)
    assert run.manifest["result"]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_seed_shuffles_and_the_written_configuration_repeats(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    first = train(config(tiny_model_dir, text_file, tmp_path / "a", seed=1))
    other = train(config(tiny_model_dir, text_file, tmp_path / "b", seed=2))
    words = ["--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "c")]
    again = train(parse(words).config)
    assert rows(first).equals(rows(again))
    one, two = (rows(d)["grad_norm"].dropna().to_numpy() for d in (first, other))
    assert len(one) == len(two)
    assert not np.array_equal(one, two)
    kept = yaml.safe_load((first / "config.yaml").read_text())
    assert kept["probe"] == {"batches": 6, "until": None, "signal": "auto"}


def test_data_that_are_used_up_end_it_with_whole_batches(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = {"max_train_samples": 30, "eval_size": 0, "probe": lt.ProbeConfig(1000)}
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "run", **settings)))
    assert run.manifest["result"]["batches"] == 7  # of 4; two examples are left
    few = {"max_train_samples": 3, "eval_size": 0}
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "few", **few)))
    assert run.manifest["result"]["batches"] == 1


def test_it_stops_when_the_scores_are_known_well_enough(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = {"probe": lt.ProbeConfig(18, until=1e6), "eval_size": 0}
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "run", **settings)))
    assert 3 <= run.manifest["result"]["batches"] < 18


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_lora_settings_no_adapters_with_them_both(
    checkpointing: bool, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    given = {"gradient_checkpointing": checkpointing}
    plain = la.load(train(config(tiny_model_dir, text_file, tmp_path / "plain", **given)))
    assert not plain.parameters["name"].str.contains("lora").any()
    assert "lora" not in plain.manifest
    given["lora"] = {"r": 2}
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "run", **given)))
    assert run.method == "probe"
    assert run.manifest["lora"]["r"] == 2
    names = run.parameters.set_index("param_id")["name"]
    found = rows(run.path)
    found["name"] = found["param_id"].map(names)
    norm = found[found["batch"] == 0].set_index("name")["grad_norm"]
    a, b = (norm[norm.index.str.contains(f"lora_{x}")] for x in "AB")
    assert len(a) == len(b) == 4 * 7
    assert (a == 0).all()  # B is zero before training
    assert (b > 0).all()
    # The weights below have the gradients that they have without adapters (BA = 0).
    base = norm[~norm.index.str.contains("lora")]
    without = rows(plain.path)
    without["name"] = without["param_id"].map(plain.parameters.set_index("param_id")["name"])
    expected = without[without["batch"] == 0].set_index("name")["grad_norm"]
    canonical = base.index.str.replace(".base_layer", "").str.replace("base_model.model.", "")
    assert set(canonical) == set(expected.index)
    np.testing.assert_allclose(base.to_numpy(), expected[canonical].to_numpy(), rtol=1e-5)


def test_autocast_is_that_of_training(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    full = train(config(tiny_model_dir, text_file, tmp_path / "fp32"))
    half = train(config(tiny_model_dir, text_file, tmp_path / "bf16", bf16=True))
    one, two = (rows(d)["grad_norm"].dropna().to_numpy() for d in (full, half))
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(one, two, rtol=0.1)


@pytest.mark.processes
def test_two_processes_measure_the_batches_that_one_measures(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    alone = train(config(tiny_model_dir, text_file, tmp_path / "alone"))
    words = ["--config", str(alone / "config.yaml"), "--probe.batches", "3"]
    launched(process, tmp_path, [(0, [*words, "--output_dir", str(tmp_path / "two")])])
    one, two = la.load(alone), la.load(tmp_path / "two")
    assert two.manifest["hardware"]["processes"] == 2
    assert two.manifest["result"]["batches"] == one.manifest["result"]["batches"] == 6
    assert two.manifest["result"]["tokens"] == one.manifest["result"]["tokens"]
    each, together = (
        [f[f["batch"].isna() == whole] for f in (rows(alone), rows(two.path))]
        for whole in (False, True)
    )
    for column in ("signal", "noise"):
        first, second = (f.set_index("param_id")[column] for f in together)
        np.testing.assert_allclose(first, second[first.index], rtol=1e-4)
    norms = [np.sort(f["grad_norm"].to_numpy()) for f in each]
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--probe.batches", "0"], "probe.batches is 0, but must be a whole number"),
        (["--probe.until", "0"], "probe.until is 0"),
        (["--probe.until", ".nan"], "probe.until is nan"),
        (["--probe.signal", "exakt"], "probe.signal"),
        (["--probe.batch", "3"], "Did you mean 'probe.batches'?"),
        (["--fp16", "true"], "fp16 is true and method is probe"),
        (["--dtype", "float16"], "dtype is float16 and method is probe: small gradients vanish"),
        (["--lisa.activated_layers", "3"], "lisa.activated_layers is set but method is 'probe'"),
        (["--method", "lora"], "probe.batches is set but method is 'lora'"),
        (["--estimate"], "the memory of a probe is not estimated"),
        (["--lr_multipliers", "none.json"], "none.json"),
        (["--lora.rr", "3"], "lora.rr is not a field of PEFT's LoraConfig"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_sentence_and_exit_2(
    words: list[str], expected: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--config", "probe", "--model_name_or_path", str(tiny_model_dir)]
    given += ["--dataset_name", str(text_file), "--output_dir", str(tmp_path / "run")]
    if words[0] == "--method":
        given += ["--probe.batches", "3"]
    assert main([*given, *words]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_a_probe_does_not_use_is_said(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the studies give it: `record.every` goes on to be taken, and to have no effect."""
    train(config(tiny_model_dir, text_file, tmp_path / "plain", eval_size=0))
    assert "makes no steps" not in capsys.readouterr().err
    record = lt.RecordConfig(every=1, grad_noise=True, select=(0, 1))
    given = {"max_steps": 3, "gradient_accumulation_steps": 2, "warmup_steps": 2, "record": record,
             "lr_scheduler_type": "constant"}  # fmt: skip
    run = train(config(tiny_model_dir, text_file, tmp_path / "run", **given))
    assert la.load(run).manifest["result"]["batches"] == 6
    notes = [line for line in capsys.readouterr().err.splitlines() if "makes no steps" in line]
    assert notes == [
        "note: a probe makes no steps and does not use lr_scheduler_type, warmup_steps, max_steps, "
        "gradient_accumulation_steps, record.every, record.grad_noise; how much it measures is "
        "probe.batches, 6."
    ]


def test_a_probe_is_not_resumed(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    settings = config(tiny_model_dir, text_file, tmp_path / "run")
    train(settings)
    kept = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="method probe has no checkpoint to go on from"):
        train(settings, resume=True)
    with pytest.raises(lt.LisaError, match="already holds a run"):
        train(settings)
    assert (tmp_path / "run" / "run.json").read_bytes() == kept


def test_runs_of_other_methods_have_no_line_of_it(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Earlier runs have none either, and are repetitions of later ones."""
    from lisa_train.command.output import to_yaml

    for method in ("full", "lora", "lisa"):
        text = to_yaml(lt.TrainConfig("m", "d", method))
        assert "probe" not in yaml.safe_load(text)
        path = tmp_path / f"{method}.yaml"
        path.write_text(text)
        assert parse(["--config", str(path)]).config == lt.TrainConfig("m", "d", method)


def test_layers_can_be_chosen(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"record": lt.RecordConfig(select=(1,)), "probe": lt.ProbeConfig(3)}
    run = la.load(train(config(tiny_model_dir, text_file, tmp_path / "run", **settings)))
    layer = run.parameters.set_index("param_id")["layer"]
    assert set(rows(run.path)["param_id"].map(layer)) == {1}
    assert json.loads((run.path / "run.json").read_text())["recording"]["select"] == [1]
