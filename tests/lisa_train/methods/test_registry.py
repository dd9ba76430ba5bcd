"""A method that the package does not know: registered here, trained, estimated, refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers_models import build_tiny_model

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main, parse, recipes
from lisa_train.methods import Method, register


class BitFit(Method):
    """Biases alone (arXiv 2106.10199)."""

    name = "bitfit"
    help = "trains the biases alone"

    def check(self, config: Any) -> None:
        if config.optim == "adafactor":
            raise ConfigError("optim is 'adafactor' and method is bitfit: choose another.")

    def check_model(self, model: Any, config: Any) -> None:
        if not any(name.endswith("bias") for name, _ in model.named_parameters()):
            raise ConfigError(f"{type(model).__name__} has no biases to train; use method full.")

    def prepare(self, model: Any, config: Any) -> None:
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(name.endswith("bias"))

    def run_entries(self, config: Any, model: Any = None) -> dict[str, Any]:
        return {"method": "bitfit", "bitfit": {"tensors": "biases"}}

    def outcome(self, result: Any) -> str:
        return f"biases for {super().outcome(result)}"


@pytest.fixture
def bitfit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[BitFit]:
    recipe = tmp_path / "bitfit.yaml"
    recipe.write_text("method: bitfit\nlearning_rate: 0.01\n")
    monkeypatch.setattr(BitFit, "recipe", recipe, raising=False)
    monkeypatch.setitem(lt.METHODS, "bitfit", BitFit())  # and taken out again
    return BitFit


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases in attention and MLP."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    build_tiny_model(folder, layers=3)
    config = AutoConfig.from_pretrained(folder, attention_bias=True, mlp_bias=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(model: Path, data: Path, out: Path, **more: Any) -> lt.TrainConfig:
    return lt.TrainConfig(
        str(model), str(data), "bitfit", str(out), max_steps=2, learning_rate=1e-2, max_length=32,
        eval_size=0, record=lt.RecordConfig(every=1), **more,
    )  # fmt: skip


def test_it_trains_and_says_so(
    bitfit: object, biased: Path, text_file: Path, tmp_path: Path
) -> None:
    from lisa_train.command.training import summary

    run = la.load(lt.train(settings(biased, text_file, tmp_path / "run")))
    assert run.method == "bitfit"
    assert run.manifest["bitfit"] == {"tensors": "biases"}
    assert yaml.safe_load((run.path / "config.yaml").read_text())["method"] == "bitfit"
    moved = run.metrics(columns=["update_norm"])
    moved = moved[moved["update_norm"].notna()]
    names = run.parameters.set_index("param_id")["name"]
    assert (moved["update_norm"] > 0).any()
    assert set(moved["param_id"].map(names)) == {n for n in names if n.endswith("bias")}
    assert "bitfit: biases for 2 steps." in summary(run.path)
    # What is saved differs from the model in the biases alone.
    from safetensors.numpy import load_file

    before = load_file(biased / "model.safetensors")
    after = load_file(run.path / "checkpoints" / "final" / "model.safetensors")
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {n for n in before if n.endswith("bias")}


def test_its_memory_is_that_of_its_tensors(bitfit: object, biased: Path) -> None:
    found = lt.estimate_memory(str(biased), "bitfit", sequence_length=16, optim="sgd")
    biases = 3 * (32 + 16 + 16 + 32 + 48 + 48 + 32)  # q, k, v, o, gate, up, down of three layers
    assert found.trainable == biases
    assert found.fullest.gradients == 4 * biases
    whole = lt.estimate_memory(str(biased), "full", sequence_length=16, optim="sgd")
    assert whole.parameters == found.parameters
    assert whole.fullest.gradients > found.fullest.gradients


def test_the_command_knows_it(
    bitfit: object, biased: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "bitfit" in recipes()
    words = ["--config", "bitfit", "--model_name_or_path", str(biased)]
    assert parse([*words, "--dataset_name", "d"]).config.method == "bitfit"
    assert main([*words, "--estimate", "--max_length", "16"]) == 0
    assert "as configured" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["--help", "methods"])
    assert "bitfit trains the biases alone" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"optim": "adafactor"}, "optim is 'adafactor' and method is bitfit"),
        ({"lora": {"r": 2}}, "lora.r is set but method is 'bitfit'"),
        ({"lisa": lt.LisaConfig(1)}, "lisa.activated_layers is set but method is 'bitfit'"),
        ({"probe": lt.ProbeConfig(3)}, "probe.batches is set but method is 'bitfit'"),
        ({"dtype": "float16"}, "dtype is float16 and method is bitfit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_its_settings_are_checked(bitfit: object, more: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        settings(Path("m"), Path("d"), Path("o"), **more)


def test_a_model_that_it_cannot_train_is_refused_without_a_trace(
    bitfit: object, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no biases"):
        lt.train(settings(tiny_model_dir, text_file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match="there is a method 'lora' already"):

        @register
        class Lora(Method):
            name = "lora"
            help = "another"

    assert type(lt.METHODS["lora"]).__module__ == "lisa_train.methods.lora"


def test_the_methods_of_the_package() -> None:
    assert {"full", "lora", "lisa", "peft", "select", "probe"} <= set(lt.METHODS)
    assert all(name == method.name and method.help for name, method in lt.METHODS.items())
