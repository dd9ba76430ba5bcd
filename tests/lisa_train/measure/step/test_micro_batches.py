"""Accumulated micro-batches give the signal of a step: against all pairs of them in float64."""

import numpy as np
import pytest
import torch
from helpers_probe import batches, float64_gradients
from helpers_recording import llama

import lisa_analysis as la
import lisa_train as lt
from lisa_analysis.contract.errors import LisaError

STEPS, MICRO = 6, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = batches(STEPS * MICRO)
    config = lt.RecordConfig(str(folder), every=1, grad_noise=True)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, STEPS + 1):
            for n, batch in enumerate(data[MICRO * (step - 1) : MICRO * step]):
                (model(**batch).loss / MICRO).backward()
                if n < MICRO - 1:
                    recorder.micro_batch(step)
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step)
            optimizer.zero_grad()
    return la.load(folder), float64_gradients(model, data)


def test_the_number_of_micro_batches_is_recorded(run):
    assert run[0].scalars["micro_batches"].tolist() == [MICRO] * STEPS


def test_the_signal_is_that_of_all_pairs_of_micro_batches(run):
    run, gradients = run
    profile = la.importance(run, "step_signal")
    for layer in range(run.n_layers):
        names = run.parameters.loc[run.parameters["layer"] == layer, "name"]
        g = torch.stack([torch.cat([b[name].flatten() for name in names]) for b in gradients])
        pairs = []
        for step in range(STEPS):
            gram = g[MICRO * step : MICRO * (step + 1)] @ g[MICRO * step : MICRO * (step + 1)].T
            pairs.append(float((gram.sum() - gram.trace()) / (MICRO * (MICRO - 1))))
        # The jackknife's estimate of the root of the mean over steps, free of most of its bias.
        root = [np.sqrt(max(np.mean(np.delete(pairs, n)) / g.shape[1], 0)) for n in range(STEPS)]
        whole = np.sqrt(max(np.mean(pairs) / g.shape[1], 0))
        expected = STEPS * whole - (STEPS - 1) * np.mean(root)
        assert 0 < whole < expected < 1.2 * whole
        assert profile[layer].score == pytest.approx(expected, rel=1e-4)


def test_a_run_without_accumulation_says_what_is_missing(tmp_path):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = lt.RecordConfig(str(tmp_path / "run"), every=1, grad_noise=True)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        model(**batches(1)[0]).loss.backward()
        recorder.before_step(1)
        optimizer.step()
        recorder.after_step(1)
    found = la.load(tmp_path / "run")
    assert found.scalars["micro_batches"].tolist() == [1]
    with pytest.raises(LisaError, match=r"record\.grad_noise, with gradient accumulation"):
        la.importance(found, "step_signal")
