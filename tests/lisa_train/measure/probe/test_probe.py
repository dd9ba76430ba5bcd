"""The probe against gradients that plain float64 autograd gives."""

import json
import warnings

import numpy as np
import pytest
import torch
from helpers_architectures import MODELS, build, inputs
from helpers_probe import batches, expected, float64_gradients, in_a_run, main, rows
from helpers_processes import ranks
from helpers_recording import llama, mixtral, t5
from torch import nn

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError, LisaError, RunDirectoryError
from lisa_train.measure.probe.batch_gradients import BatchGradients, agreement
from lisa_train.measure.probe.sketch import BUCKETS, Sketch


def test_every_number_is_that_of_float64(tmp_path):
    model = llama(tied=True)
    data = batches(6)
    run_dir = lt.probe(model, data, tmp_path / "run", signal="exact")
    truth = expected(float64_gradients(model, data), dict(model.named_parameters()))
    frame = rows(run_dir)
    assert set(frame["name"]) == set(truth)
    assert len(frame) == len(truth) * (len(data) + 1)
    for name, of_tensor in frame.groupby("name"):
        single = of_tensor[of_tensor["batch"].notna()].sort_values("batch")
        assert single["batch"].tolist() == list(range(len(data)))
        for column in ("grad_norm", "grad_norm_l1"):
            np.testing.assert_allclose(single[column], truth[name][column], rtol=1e-5)
        size = np.abs(truth[name]["taylor"]).max()
        np.testing.assert_allclose(single["taylor"], truth[name]["taylor"], atol=1e-5 * size)
        together = of_tensor[of_tensor["batch"].isna()].iloc[0]
        scale = truth[name]["signal"] + truth[name]["noise"]
        assert together["signal"] == pytest.approx(truth[name]["signal"], abs=2e-5 * abs(scale))
        assert together["noise"] == pytest.approx(truth[name]["noise"], rel=1e-4)
        # No tensor here is larger than a sketch: single batches are exact as well.
        np.testing.assert_allclose(single["signal"], truth[name]["agreement"], atol=2e-5 * scale)


def test_the_sketch_is_unbiased_and_as_wide_as_it_says():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(300, 170, generator=generator)
    g = mean + 3 * torch.randn(8, 300, 170, generator=generator)
    flat = g.double().flatten(1)
    gram = flat @ flat.T
    n = len(g)
    exact = float((gram.sum() - gram.trace()) / (n * (n - 1)))
    estimates = []
    for seed in range(40):
        sketch = Sketch(seed)
        sketches = torch.stack([sketch(7, x) for x in g]).double().numpy()
        squares = gram.diag().numpy()[:, None]
        estimates.append(float(agreement(squares, [sketches], None).mean()))
        calibrated = agreement(squares, [sketches], np.array([float(gram.sum())]))
        assert calibrated.mean() == pytest.approx(exact, rel=1e-9)
    error = np.std(estimates) / exact
    # The batches' noise adds to the products of sketches what it adds to those of gradients.
    noise = float((flat - flat.mean(0)).square().sum() / (n - 1))
    bound = np.sqrt(2 / BUCKETS) * (exact + noise / n) / exact
    assert abs(np.mean(estimates) / exact - 1) < 4 * error / np.sqrt(40)
    assert 0.5 * bound < error < 1.5 * bound


def test_sketched_signal_agrees_with_the_exact_one(tmp_path):
    model = llama(hidden_size=96, intermediate_size=160)
    data = batches(8)
    exact = rows(lt.probe(model, data, tmp_path / "a", signal="exact"))
    sketched = rows(lt.probe(model, data, tmp_path / "b", signal="sketch"))
    a, b = (f[f["batch"].isna()].set_index("name") for f in (exact, sketched))
    large = a.index[[p.numel() > BUCKETS for _, p in model.named_parameters()]]
    assert len(large) > 10
    scale = a["signal"] + a["noise"] / len(data)
    gap = (b["signal"] - a["signal"]) / scale
    assert 1e-4 < gap[large].abs().mean() < 0.1
    assert gap[a.index.difference(large)].abs().max() < 1e-4
    # The numbers of single batches do not pass through the sketch.
    columns = ["grad_norm", "grad_norm_l1", "taylor"]
    assert (exact.loc[exact["batch"].notna(), columns] == sketched.loc[
        sketched["batch"].notna(), columns
    ]).all(axis=None)  # fmt: skip


@pytest.mark.parametrize("build", [mixtral, t5], ids=["experts", "encoder-decoder"])
def test_other_families(tmp_path, build):
    model = build()
    data = [
        {k: v for k, v in batch.items() if build is not t5 or k != "attention_mask"}
        for batch in batches(3)
    ]
    frame = rows(lt.probe(model, data, tmp_path / "run"))
    # torch's fused experts know no float64.
    dtype = torch.float32 if build is mixtral else torch.float64
    gradients = float64_gradients(model, data, dtype)
    truth = expected(gradients, dict(model.named_parameters()))
    for name, of_tensor in frame.groupby("name"):
        single = of_tensor[of_tensor["batch"].notna()]
        np.testing.assert_allclose(
            single["grad_norm"], truth[name]["grad_norm"], rtol=1e-4, atol=1e-7
        )


def test_adapters_and_the_weights_below_them(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    frame = rows(lt.probe(model, batches(3), tmp_path / "run"))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    measured = set(frame["name"])
    assert measured == set(flags)
    # B starts at zero: A has a gradient of zero, measured as such.
    single = frame[frame["batch"].notna()]
    assert (single.loc[single["name"].str.contains("lora_A"), "grad_norm"] == 0).all()
    assert (single.loc[single["name"].str.contains("lora_B"), "grad_norm"] > 0).all()


def test_nothing_of_the_model_or_the_random_state_changes(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = [id(p) for p in model.parameters()]
    state = torch.get_rng_state()
    lt.probe(model, batches(2), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in model.parameters()] == tensors
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.get_input_embeddings().weight.requires_grad
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert optimizer.state == {}


def test_an_error_leaves_the_model_as_it_was_and_the_batches_that_were_done(tmp_path):
    model = llama()
    tensors = [id(p) for p in model.parameters()]

    def broken():
        yield from batches(3)
        raise RuntimeError("the data ended in an accident")

    with pytest.raises(RuntimeError, match="accident"):
        lt.probe(model, broken(), tmp_path / "run")
    assert [id(p) for p in model.parameters()] == tensors
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["status"] == "failed"
    assert "accident" in manifest["error"]
    assert rows(tmp_path / "run")["batch"].max() == 2


def test_memory_holds_one_gradient_at_a_time(tmp_path):
    """Gradients alive at any take: that of the tensor itself, and of no other."""
    model = llama(layers=4)
    alive = []

    def loss(module, batch):
        leaves = dict(module.named_parameters())

        def count(leaf):
            alive.append(sum(p.grad is not None for p in leaves.values()))

        for leaf in leaves.values():
            leaf.register_post_accumulate_grad_hook(count)
        return module(**batch).loss

    lt.probe(model, batches(1), tmp_path / "run", loss=loss)
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) == 0  # dropped before any later hook of the same tensor runs


def test_it_stops_at_the_wanted_precision(tmp_path):
    class Quadratic(nn.Module):
        """Loss of a batch: ⟨θ, mean + noise⟩, whose gradient is mean + noise."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))

    model = Quadratic()
    generator = torch.Generator().manual_seed(0)

    def endless():
        while True:
            yield [1.0 + 0.5 * torch.randn(16, 16, generator=generator) for _ in range(3)]

    def loss(module, batch):
        return sum((layer.weight * x).sum() for layer, x in zip(module.layers, batch, strict=True))

    taken = {}
    for until in (0.05, 0.01):
        run_dir = lt.probe(
            model, endless(), tmp_path / str(until), 2000,
            lt.RecordConfig(layers="layers"), loss=loss, until=until,
        )  # fmt: skip
        taken[until] = json.loads((run_dir / "run.json").read_text())["result"]["batches"]
    # Half-width of √U over √U: about t · 2 · (½/16) / √n / 2 of a mean of one.
    assert 8 <= taken[0.05] < 30
    assert 30 < taken[0.01] < 200


def test_another_word_for_the_signal_is_refused(tmp_path):
    """Any other word than exact had meant sketch."""
    with pytest.raises(ConfigError, match=r"signal is 'Exact', but must be one of auto, exact"):
        lt.probe(llama(), batches(1), tmp_path / "run", signal="Exact")
    assert not (tmp_path / "run").exists()


def test_what_it_refuses(tmp_path):
    model = llama()
    with pytest.raises(LisaError, match="no batch"):
        lt.probe(model, [], tmp_path / "a")
    unlabelled = [{"input_ids": batches(1)[0]["input_ids"]}]
    with pytest.raises(LisaError, match="labels"):
        lt.probe(model, unlabelled, tmp_path / "b")
    lt.probe(model, batches(1), tmp_path / "c")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        lt.probe(model, batches(1), tmp_path / "c")
    with pytest.raises(ConfigError, match="nothing in the model matches"):
        lt.probe(model, batches(1), tmp_path / "d", config=lt.RecordConfig(select=("nothing",)))


def test_one_batch_has_no_signal(tmp_path):
    frame = rows(lt.probe(llama(), batches(1), tmp_path / "run"))
    assert frame["signal"].isna().all()
    assert frame["noise"].isna().all()
    assert frame.loc[frame["batch"].notna(), "grad_norm"].notna().all()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model = llama().train()
    a = rows(lt.probe(model, batches(2), tmp_path / "a"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    b = rows(lt.probe(model, batches(2), tmp_path / "b"))
    np.testing.assert_allclose(a["grad_norm"].dropna(), b["grad_norm"].dropna(), rtol=1e-6)


def test_a_gradient_that_comes_in_two_parts_is_refused():
    weight = torch.zeros(3)
    gradients = BatchGradients([(5, weight)], exact=True)
    gradients.take(5, torch.ones(3))
    with pytest.raises(LisaError, match=r"tensor 5 twice.*use_reentrant=False"):
        gradients.take(5, torch.ones(3))


def test_a_run_directory_that_the_analysis_opens(tmp_path):
    import lisa_analysis as la

    run_dir = lt.probe(llama(), batches(4), tmp_path / "run", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = la.load(run_dir)
    assert run.method == "probe"
    assert run.status == "finished"
    assert run.manifest["result"]["batches"] == 3
    assert run.manifest["result"]["tokens"] > 0
    assert not run.warnings
    assert run.metrics(steps=[0])["weight_norm"].notna().all()


@pytest.mark.processes
@pytest.mark.parametrize("signal", ["exact", "sketch"])
def test_two_processes_take_the_batches_of_one(two, tmp_path, signal):
    one = rows(lt.probe(llama(), [*batches(5)[0::2], *batches(5)[1::2]], tmp_path / "one",
                        signal=signal))  # fmt: skip
    together = rows(two / signal)
    assert len(one) == len(together)
    for column in ("grad_norm", "grad_norm_l1", "taylor", "signal", "noise"):
        size = one[column].abs().max()
        np.testing.assert_allclose(together[column], one[column], rtol=2e-5, atol=1e-6 * size)


@pytest.mark.processes
def test_two_processes_probe_a_run_as_one_does(two, tmp_path):
    in_a_run(tmp_path / "run", [*batches(4)[0::2], *batches(4)[1::2]])
    one, together = rows(tmp_path / "run"), rows(two / "run")
    assert len(one) == len(together) > 0
    for column in ("grad_norm", "grad_norm_l1", "taylor", "signal", "noise"):
        size = one[column].abs().max()
        np.testing.assert_allclose(together[column], one[column], rtol=2e-5, atol=1e-6 * size)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    ranks(main, folder)
    return folder


# Torch's fused experts know no float64, and a router may choose otherwise in it.
EXPERTS = {"mixtral", "qwen3_moe"}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_family_that_is_loaded(tmp_path, name):
    model = build(name).eval()
    data = [inputs(name), {key: x.flip(0) for key, x in inputs(name).items()}]
    if name == "llava":  # the picture's place holders stay where they are
        data[1]["input_ids"] = data[1]["input_ids"].flip(0)
    data[1]["labels"] = data[1]["labels"].flip(0).contiguous()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    frame = rows(lt.probe(model, data, tmp_path / "run"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    dtype = torch.float32 if name in EXPERTS else torch.float64
    wide = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in data
    ]
    gradients = float64_gradients(model, wide, dtype)
    truth = expected(gradients, dict(model.named_parameters()))
    reached = {n for n in truth if any(g[n].abs().max() > 0 for g in gradients)}
    assert set(frame["name"]) >= reached
    largest = max(t["grad_norm"].max() for t in truth.values())
    for tensor, of_tensor in frame.groupby("name"):
        single = of_tensor[of_tensor["batch"].notna()].sort_values("batch")
        np.testing.assert_allclose(
            single["grad_norm"], truth[tensor]["grad_norm"], rtol=2e-4, atol=1e-6 * largest
        )


def test_an_error_that_keeping_what_was_done_meets_is_a_note_on_the_first(tmp_path, monkeypatch):
    from lisa_train.measure.disk.writer import RunWriter

    def full(self, step, columns):
        raise OSError(28, "No space left on device")

    def broken():
        yield from batches(3)
        raise RuntimeError("the data ended in an accident")

    monkeypatch.setattr(RunWriter, "write_probe", full)
    with pytest.raises(RuntimeError, match="accident") as caught:
        lt.probe(llama(), broken(), tmp_path / "run")
    assert any("No space left" in note for note in caught.value.__notes__)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["status"] == "failed"
    assert "accident" in manifest["error"]


def test_the_bar_counts_to_where_the_precision_is_expected(tmp_path, monkeypatch):
    from lisa_train.measure.probe import probing

    seen = []
    expect = probing._expect

    def spy(bar, done, width, until, limit):
        expect(bar, done, width, until, limit)
        seen.append((done, width, bar.total))

    monkeypatch.setattr(probing, "_expect", spy)
    lt.probe(llama(), batches(16), tmp_path / "run", 16, until=0.02, progress=False)
    assert [done for done, _, _ in seen] == [8, 10, 13]
    assert all(np.isfinite(width) and total == 16 for _, width, total in seen)
    seen.clear()
    lt.probe(llama(), batches(16), tmp_path / "other", until=0.02, progress=False)
    for done, width, total in seen:
        assert total == int(np.ceil(done * (width / 0.02) ** 2))
