"""`method: select`: exactly what is named trains, to the bit, and what is wrongly named is said."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_architectures import build
from helpers_models import build_tiny_model
from safetensors.numpy import load_file

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main
from lisa_train.command.training import train
from lisa_train.methods.select.choice import choose
from lisa_train.methods.select.config import SelectConfig, layer_indices
from lisa_train.methods.select.spectrum import weight_snr


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, an untied head, biases."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    build_tiny_model(folder, layers=4)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False, attention_bias=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(model: Path, data: Path, out: Path, **more: Any) -> lt.TrainConfig:
    given: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32,
        "eval_size": 16, "record": lt.RecordConfig(every=1, base_delta=True),
        "progress_bar": False,
    }  # fmt: skip
    return lt.TrainConfig(str(model), str(data), "select", str(out), **{**given, **more})


def profile_file(folder: Path, scores: list[float | None], **more: Any) -> str:
    rows = [{"layer": i, "name": f"model.layers.{i}", "score": s} for i, s in enumerate(scores)]
    path = folder / "profile.json"
    path.write_text(json.dumps({"by": "layer", "layers": rows} | more))
    return str(path)


CHOICES = {
    "ranges": ({"layers": "0-1,3"}, r"model\.layers\.(0|1|3)\..*"),
    "list": ({"layers": [2]}, r"model\.layers\.2\..*"),
    "even": ({"even": 2}, r"model\.layers\.(1|3)\..*"),
    "last": ({"last": 2}, r"model\.layers\.(2|3)\..*"),
    "top": ({"top": 2}, r"model\.layers\.(0|2)\..*"),
    "bitfit": ({"tensors": (".*bias",)}, r".*\.bias"),
    "head": ({"groups": ("head",)}, r"lm_head\.weight"),
    "several": (
        {"layers": "1", "groups": ("embed", "norm"), "tensors": (r".*\.0\.mlp\.down_proj\..*",)},
        r"model\.layers\.1\..*|model\.(embed_tokens|norm)\.weight|model\.layers\.0\.mlp\.down.*",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_named_trains_and_all_else_keeps_its_bits(
    name: str, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    given, pattern = CHOICES[name]
    if name == "top":
        given = given | {"profile": profile_file(tmp_path, [0.9, None, 0.7, 0.1])}
    config = settings(model_dir, text_file, tmp_path / "run", select=SelectConfig(**given))
    run = la.load(train(config))
    before = load_file(model_dir / "model.safetensors")
    after = load_file(run.path / "checkpoints" / "final" / "model.safetensors")
    wanted = {n for n in before if re.fullmatch(pattern, n)}
    assert {n for n in before if not np.array_equal(before[n], after[n])} == wanted
    # The same in the log, with the norms that float64 gives.
    names = run.parameters.set_index("param_id")["name"]
    rows = run.metrics(["weight_norm", "grad_norm", "delta_norm"])
    assert set(rows[rows["grad_norm"].notna()]["param_id"].map(names)) == wanted
    last = rows[rows["step"] == 6].set_index("param_id").rename(index=names)
    for tensor in wanted:
        norm = np.linalg.norm(after[tensor].astype(np.float64))
        assert last.loc[tensor, "weight_norm"] == pytest.approx(norm, rel=1e-5)
        moved = np.linalg.norm(after[tensor].astype(np.float64) - before[tensor])
        assert last.loc[tensor, "delta_norm"] == pytest.approx(moved, rel=1e-5)
    result = run.manifest["result"]
    assert result["last_held_out_loss"] < result["first_held_out_loss"]
    entry = run.manifest["select"]
    assert run.method == "select"
    assert entry["chosen_tensors"] == len(wanted)
    assert entry["chosen_parameters"] == sum(before[n].size for n in wanted)
    layers = {int(m[1]) for n in wanted if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    if name not in ("bitfit", "several"):
        assert entry["chosen_layers"] == sorted(layers)


def test_the_kept_configuration_repeats_the_run_without_the_file(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    path = profile_file(tmp_path, [0.1, 0.2, 0.3, 0.4])
    select = SelectConfig(top=1, profile=path)
    run = train(settings(model_dir, text_file, tmp_path / "a", select=select))
    Path(path).unlink()
    assert main(["--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    a, b = (la.load(tmp_path / name) for name in "ab")
    assert list(a.scalars["loss"]) == list(b.scalars["loss"])
    assert b.manifest["select"]["chosen_layers"] == [3]


def spectrum_snr(matrix: np.ndarray) -> float:
    """SNR as the code of arXiv 2406.06623 has it, from a singular value decomposition."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    beta = min(matrix.shape) / max(matrix.shape)
    sigma = np.subtract(*np.percentile(values, [75, 25])) / 1.349
    edge = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    return values[values > edge].sum() / values[values <= edge].sum() / values[0]


def test_spectrum_takes_the_best_of_each_kind_by_the_weights_as_loaded(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    before = load_file(model_dir / "model.safetensors")
    kinds: dict[str, dict[str, float]] = {}
    for name, tensor in before.items():
        if (m := re.fullmatch(r"model\.layers\.\d+\.(.*)", name)) and tensor.ndim == 2:
            kinds.setdefault(m[1], {})[name] = spectrum_snr(tensor)
    assert len(kinds) == 7
    best = {n for scores in kinds.values() for n in sorted(scores, key=lambda n: -scores[n])[:2]}
    wanted = best | {n.replace(".weight", ".bias") for n in best} & set(before)
    # 0.7 of four is 2.8: two, as in its code.
    config = settings(model_dir, text_file, tmp_path / "run", select=SelectConfig(spectrum=0.7))
    run = la.load(train(config))
    after = load_file(run.path / "checkpoints" / "final" / "model.safetensors")
    assert {n for n in before if not np.array_equal(before[n], after[n])} == wanted
    assert run.manifest["select"]["chosen_tensors"] == len(wanted) == 14 + 8
    # The metric of the analysis is the mean over a layer's matrices of the same figure.
    metric = la.importance(la.load(model_dir), metric="spectrum_snr")
    means = [np.mean([v for scores in kinds.values() for n, v in scores.items()
                      if n.startswith(f"model.layers.{i}.")]) for i in range(4)]  # fmt: skip
    np.testing.assert_allclose(metric.scores, means, rtol=1e-6)


def test_spectrum_in_stacks_experts_and_matrices_without_a_spectrum() -> None:
    import torch

    t5 = build("t5")
    with torch.no_grad():
        for name, tensor in t5.named_parameters():
            if name.endswith("wo.weight") and name.startswith("decoder.block.1"):
                tensor.zero_()
    half = set(choose(t5, SelectConfig(spectrum=0.5)).tensors)
    # Three encoder layers give one of a kind, two decoder layers one, and never the zeros.
    for stack in ("encoder", "decoder"):
        found = [n for n in half if re.search(rf"{stack}.*\.SelfAttention\.q\.", n)]
        assert len(found) == 1
    assert {n for n in half if n.startswith("decoder") and "wo.w" in n} == {
        "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    }
    assert not any("relative_attention_bias" in n for n in half)  # the one of its kind

    experts = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    mean = np.mean([spectrum_snr(m.numpy()) for m in experts])
    assert weight_snr(experts) == pytest.approx(mean, rel=1e-6)
    assert np.isnan(weight_snr(torch.zeros(4, 4)))


@pytest.mark.parametrize(
    "select", [{"layers": "1"}, {"groups": ("head",)}, {"spectrum": 0.25}], ids=str
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    select: dict[str, Any], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    config = settings(
        model_dir, text_file, tmp_path / "a", select=SelectConfig(**select), save_steps=3
    )
    whole = la.load(train(config))
    other = dataclasses.replace(config, output_dir=str(tmp_path / "b"))
    train(other)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint-6")
    resumed = la.load(train(other, resume=True))
    assert list(resumed.scalars["loss"]) == list(whole.scalars["loss"])
    files = [r.path / "checkpoints" / "final" / "model.safetensors" for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_saved_profile_and_probabilities_of_a_pilot_are_read(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    pilot = settings(model_dir, text_file, tmp_path / "pilot", select=SelectConfig(layers="0-3"))
    profile = la.importance(la.load(train(pilot)), metric="grad_rms")
    saved = profile.save(tmp_path / "profile.json")
    scores = profile.to_frame().query("layer.notna()")["score"].to_numpy()
    best = sorted(np.argsort(-scores)[:2].tolist())
    select = SelectConfig(top=2, profile=str(saved))
    run = la.load(train(settings(model_dir, text_file, tmp_path / "run", select=select)))
    assert run.manifest["select"]["chosen_layers"] == best
    path = tmp_path / "probabilities.json"
    path.write_text(
        json.dumps(
            {
                "schema_version": "1.1",
                "layer_names": [f"model.layers.{i}" for i in range(4)],
                "activated_layers": 1,
                "inclusion_probabilities": [0.1, 0.5, 0.3, 0.1],
            }
        )
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert choose(model, SelectConfig(top=2, profile=str(path))).layers == (1, 2)


def test_the_last_layers_of_an_encoder_decoder_are_those_of_both_stacks() -> None:
    chosen = choose(build("t5"), SelectConfig(last=1))
    assert chosen.layers == (2, 4)  # encoder of 3, decoder of 2
    assert all(re.match(r"(en|de)coder\.block\.(2|1)\.", n) for n in chosen.tensors)
    assert choose(build("t5"), SelectConfig(even=1)).layers == (1, 4)


@pytest.mark.parametrize(("depth", "number"), [(30, 6), (12, 2), (7, 3), (5, 5), (9, 1)])
def test_even_layers_are_as_far_from_each_other_as_they_can_be(depth: int, number: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **sizes))
    chosen = choose(model, SelectConfig(even=number)).layers
    assert len(chosen) == number
    steps = np.diff(chosen)
    assert np.ptp(steps) <= 1 if number > 1 else True
    before, behind = chosen[0], depth - 1 - chosen[-1]
    assert -1 <= before - behind <= 1
    assert max(before, behind) <= depth / (2 * number)
    if (depth, number) == (30, 6):
        assert chosen == (2, 7, 12, 17, 22, 27)


def test_a_tied_head_is_said_to_be_the_embeddings(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "head", "--model_name_or_path", str(tiny_model_dir), "--dataset_name",
             str(text_file), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    assert "the head is tied to the embeddings" in capsys.readouterr().err
    rows = la.load(tmp_path / "run")
    moved = rows.metrics(["grad_norm"]).dropna()
    names = rows.parameters.set_index("param_id")["name"]
    assert set(moved["param_id"].map(names)) == {"model.embed_tokens.weight"}


def test_its_memory_is_that_of_what_is_named(model_dir: Path) -> None:
    options: dict[str, Any] = {"sequence_length": 16, "optim": "sgd"}
    found = lt.estimate_memory(
        str(model_dir), "select", select=SelectConfig(tensors=(".*bias",)), **options
    )
    assert found.trainable == 4 * (32 + 16 + 16 + 32)
    assert found.fullest.gradients == 4 * found.trainable
    quarter = lt.estimate_memory(
        str(model_dir), "select", select=SelectConfig(spectrum=0.25), **options
    )
    one_layer = lt.estimate_memory(
        str(model_dir), "select", select=SelectConfig(layers="0"), **options
    )
    assert quarter.trainable == one_layer.trainable - 2 * 32  # but for the norms
    whole = lt.estimate_memory(str(model_dir), "select", select=SelectConfig(
        layers="0-3", groups=("embed", "head", "norm")), **options)  # fmt: skip
    full = lt.estimate_memory(str(model_dir), "full", **options)
    assert (whole.trainable, whole.total) == (full.trainable, full.total)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"layers": "0-9"}, r"select.layers holds 9, but the model has layers 0 to 3"),
        ({"last": 5}, r"select.last is 5, but model.layers has 4 layers"),
        ({"even": 5}, r"select.even is 5, but model.layers has 4 layers"),
        ({"groups": ("other",)}, r"no such tensors; beside its layers it has embed, head, norm"),
        ({"tensors": ("bias",)}, r"matches no whole name of a tensor.*'model.layers.0"),
        (
            {"spectrum": 0.2},
            r"spectrum is 0.2, which is less than one of the 4 layers.* least 0.25",
        ),
        ({"top": 5, "profile": [1, 2, 3, 4]}, r"select.top is 5, but .* a score of 4 layers"),
        ({"top": 3, "profile": [0, 2, -1, 3]}, r"2 layers have a score above 0: .* layer 0, has 0"),
        ({"top": 1, "profile": [2, 2, 3, 3]}, r"layers 2 and 3 have the same score"),
        ({"top": 1, "profile": [1, 2]}, r"is about 2 layers .* and not the 4"),
        ({"top": 1, "profile": "gone.json"}, r"gone.json cannot be read \(No such file"),
    ],
    ids=str,
)
def test_names_that_the_model_does_not_have(
    given: dict[str, Any], expected: str, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    if isinstance(given.get("profile"), list):
        given = given | {"profile": profile_file(tmp_path, given["profile"])}
    with pytest.raises(ConfigError, match=expected):
        train(settings(model_dir, text_file, tmp_path / "run", select=SelectConfig(**given)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"layers": "3-1"}, r"select.layers holds '3-1'"),
        ({"layers": "a"}, r"expected indices from 0"),
        ({"layers": [0, -1]}, r"select.layers holds '-1'"),
        ({"tensors": ("(",)}, r"no regular expression"),
        ({"groups": ("heads",)}, r"Did you mean 'head'"),
        ({"top": 2}, r"select.top and select.profile go together"),
        ({"spectrum": 1.5}, r"select.spectrum is 1.5, but must be a share from 0 to 1"),
        ({"spectrum": "half"}, r"select.spectrum is 'half', but must be a share from 0 to 1"),
        ({"last": 1.5}, r"select.last is 1.5"),
        ({"even": -1}, r"select.even is -1"),
    ],
    ids=str,
)
def test_settings_that_say_nothing(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        SelectConfig(**given)


def test_settings_are_those_of_this_method() -> None:
    with pytest.raises(ConfigError, match=r"method is select but nothing is named"):
        lt.TrainConfig("m", "d", "select")
    with pytest.raises(ConfigError, match=r"select.last is set but method is 'lora'"):
        lt.TrainConfig("m", "d", "lora", select=SelectConfig(last=1))
    assert layer_indices("11, 0-3,2") == (0, 1, 2, 3, 11)
    assert SelectConfig(layers=[3, 0, 1]).layers == "0-1,3"
