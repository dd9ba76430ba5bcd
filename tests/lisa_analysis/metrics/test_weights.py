"""Static priors by their published formulas; weights of a run found, or said to be missing."""

import numpy as np
import pytest
import torch
from helpers_runs import write_run
from safetensors.torch import save_file
from scipy import stats

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.statistics.spectra import alpha_hill, effective_rank, snr

SHAPES = {"self_attn.q_proj": (30, 20), "mlp.up_proj": (50, 20)}


def weights(layers=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            left, right = (torch.randn(side, generator=rng) for side in shape)
            noise = torch.randn(*shape, generator=rng)
            found[f"model.layers.{layer}.{name}.weight"] = noise + 3 / (layer + 1) * torch.outer(
                left, right
            )
    return found


def spectrum_by_torch(weight):
    """Spectrum's SNR, written down from its repository in torch's own functions, float32."""
    values = torch.linalg.svdvals(weight)
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
    n, m = weight.shape
    beta = n / m if n < m else m / n
    threshold = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return (signal / noise / values[0]).item()


def hill_by_definition(weight):
    """PL_Alpha_Hill as AlphaLoRA and TempBalance compute it, from the sorted eigenvalues."""
    eigenvalues = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    i = len(eigenvalues) // 2
    n = len(eigenvalues) - i
    return 1 + n / (np.log(eigenvalues[i:]).sum() - n * np.log(eigenvalues[i]))


def test_priors_of_a_model_are_means_over_its_matrices(tmp_path):
    model = weights()
    save_file(model, tmp_path / "model.safetensors")
    found = {m: la.importance(tmp_path, m).scores for m in ("spectrum_snr", "heavy_tail_alpha",
                                                            "base_norm", "depth")}  # fmt: skip
    for layer in range(3):
        own = [w for name, w in model.items() if f"layers.{layer}." in name]
        expected = np.mean([spectrum_by_torch(w) for w in own])
        assert found["spectrum_snr"][layer] == pytest.approx(expected, rel=1e-4)
        expected = np.mean([hill_by_definition(w) for w in own])
        assert found["heavy_tail_alpha"][layer] == pytest.approx(expected, rel=1e-6)
        expected = np.sqrt(sum(float((w.double() ** 2).sum()) for w in own))
        assert found["base_norm"][layer] == pytest.approx(expected, rel=1e-9)
    assert found["depth"].tolist() == [0, 0.5, 1]


def test_alpha_is_the_maximum_likelihood_of_a_power_law():
    """Against scipy's Pareto fit of the same tail, and against a planted exponent."""
    rng = np.random.default_rng(0)
    eigenvalues = np.sort(rng.pareto(1.5, 2001) + 1)
    tail = eigenvalues[len(eigenvalues) // 2 :]
    shape, _, _ = stats.pareto.fit(tail, floc=0, fscale=tail[0])
    found = alpha_hill(np.sqrt(eigenvalues))
    assert found == pytest.approx(1 + shape, rel=1e-6)
    assert found == pytest.approx(2.5, rel=0.1)


def test_effective_rank_is_that_of_roy_and_vetterli():
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)
    values = np.array([3.0, 2, 1])
    assert effective_rank(values) == pytest.approx(np.exp(stats.entropy(values)))
    assert np.isnan(effective_rank(np.zeros(3)))


def test_a_matrix_without_noise_has_no_snr():
    assert np.isnan(snr(np.zeros(5), 5, 5))
    assert np.isnan(snr(np.array([2.0]), 1, 9))


@pytest.fixture
def run(tmp_path):
    """A run whose base model and final weights lie in folders."""
    base, scale = tmp_path / "base", 0.1
    base.mkdir()
    run = write_run(tmp_path / "run", n_layers=3, steps=30, every=1, method="full",
                    kinds=("attn.q", "mlp.up"), model_name=str(base))  # fmt: skip
    final = run / "checkpoints" / "final"
    final.mkdir(parents=True)
    before = weights()
    save_file(before, base / "model.safetensors")
    after = {name: w + scale * (i + 1) for i, (name, w) in enumerate(before.items())}
    save_file(after, final / "model.safetensors")
    return run, before, after


def test_a_run_finds_its_weights(run):
    path, before, after = run
    found = la.importance(path, "delta_norm").scores
    for layer in range(3):
        own = [name for name in before if f"layers.{layer}." in name]
        total = sum(float(((after[n].double() - before[n].double()) ** 2).sum()) for n in own)
        assert found[layer] == pytest.approx(total**0.5, rel=1e-6)
    assert np.isfinite(la.importance(path, "spectrum_snr", by="module").scores).all()


def test_a_base_that_is_elsewhere_is_named(run, tmp_path):
    path, before, _ = run
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(LisaError, match=r"no folder with safetensors here: say where it is"):
        la.importance(path, "base_norm")
    found = la.importance(la.load(path, base=tmp_path / "moved"), "base_norm").scores
    own = [w for name, w in before.items() if "layers.1." in name]
    assert found[1] == pytest.approx(sum(float((w.double() ** 2).sum()) for w in own) ** 0.5)


def test_a_base_in_the_hubs_cache_is_found(run, tmp_path, monkeypatch):
    path, _, _ = run
    manifest = path / "run.json"
    manifest.write_text(manifest.read_text().replace(str(tmp_path / "base"), "example/tiny"))
    folder = tmp_path / "hub" / "models--example--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    (tmp_path / "base").rename(folder / "snapshots" / "abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert np.isfinite(la.importance(path, "base_norm").scores).all()


def test_priors_stand_in_the_table_of_validity(run):
    from helpers_ablation import ablation_rows, layers, write_ablation

    path, _, _ = run
    write_ablation(path, ablation_rows({}, layers([0.1, 0.2, 0.3])))
    metrics = {*la.validity(path).to_frame()["metric"]}
    assert {"spectrum_snr", "heavy_tail_alpha", "base_norm", "depth", "stable_rank"} <= metrics


def test_spectra_that_take_long_are_not_taken_unasked(run, monkeypatch):
    from helpers_ablation import ablation_rows, layers, write_ablation

    from lisa_analysis.runs.metric_validity import sides

    path, _, _ = run
    write_ablation(path, ablation_rows({}, layers([0.1, 0.2, 0.3])))
    monkeypatch.setattr(sides, "MOST_WORK", 1.0)
    opened = la.load(path)
    found = la.validity(opened)
    assert "call importance(run, 'spectrum_snr') first" in found.missing["spectrum_snr"]
    la.importance(opened, "spectrum_snr")
    assert "spectrum_snr" in {*la.validity(opened).to_frame()["metric"]}
