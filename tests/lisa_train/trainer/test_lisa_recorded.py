"""What a run directory says of LISA: notices, draws without gradient, coverage."""

import helpers_architectures as known
import numpy as np
import pytest
import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.plans.sampling import SamplingProbabilities
from lisa_analysis.rundir.opening import load
from lisa_train.model import layer_map


def sounds(n=16):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_values": torch.randn(2000, generator=generator), "labels": i % 2} for i in range(n)
    ]


class Reached(TrainerCallback):
    """Notes which layers have a gradient, step by step, without the engine's help."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layers = self.model.hubert.encoder.layers
        self.steps.append(
            {i for i, b in enumerate(layers) if any(p.grad is not None for p in b.parameters())}
        )


def test_the_run_names_what_trains_beside_the_layers_and_draws_without_gradient(tmp_path):
    model = known.build("hubert")
    model.config.layerdrop = 0.5
    reached = Reached(model)
    trainer = Trainer(
        model, arguments(tmp_path / "out", max_steps=12, seed=3), train_dataset=sounds(),
        callbacks=[reached],
    )  # fmt: skip
    lt.attach(
        trainer,
        lisa=lt.LisaConfig(1, 3, optimizer_state="keep"),
        record=lt.RecordConfig(str(tmp_path / "run"), every=1),
    )
    trainer.train()
    run = load(tmp_path / "run")
    events = run.events
    said = events.loc[events["event"] == "warning", "message"].tolist()
    assert "LISA trains in every period what is neither layer, embedding, head nor" in said[0]
    assert "feature_projection.projection" in said[0]
    assert said[1].startswith("config.layerdrop is 0.5: the model skips")
    draws = events[events["event"] == "lisa_draw"]
    expected = []
    for step, (layer,) in zip(draws["step"], draws["layers"], strict=True):
        missed = sum(layer not in seen for seen in reached.steps[step : step + 3])
        if missed:
            expected.append(f"layer {layer} in {missed} of the 3 steps after step {step} ")
    assert len(expected) >= 2
    found = [text for text in said if text.startswith("drawn layers had no gradient")]
    assert [text.split("move: ")[1].split("(the model")[0] for text in found] == expected
    visits = np.bincount([i for (i,) in draws["layers"]], minlength=3).tolist()
    assert run.manifest["result"]["layer_visits"] == visits


def test_a_run_without_anything_odd_has_no_warning_and_covers_every_layer(make_llama, tmp_path):
    model = make_llama(layers=3)
    ids = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    config = lt.LisaConfig(1, 1, "cyclic")
    for again in (False, True):
        trainer = Trainer(model, arguments(tmp_path / "out", **settings), train_dataset=rows)
        lt.attach(trainer, lisa=config, record=lt.RecordConfig(str(tmp_path / "run")), resume=again)
        checkpoint = str(tmp_path / "out" / "checkpoint-3") if again else None
        trainer.train(resume_from_checkpoint=checkpoint)
        run = load(tmp_path / "run")
        # After a resume too, the draws of the whole run count.
        assert run.manifest["result"]["layer_visits"] == [2, 2, 2]
        assert run.manifest["result"]["layers_never_drawn"] == []
        assert not (run.events["event"] == "warning").any()


@pytest.mark.parametrize("with_lisa", [True, False])
def test_layers_are_found_and_probabilities_read_once(tmp_path, monkeypatch, with_lisa):
    """From `attach` over two trainings; a model that has other tensors since is looked at anew."""
    pytest.importorskip("bitsandbytes")
    model = llama()
    file = tmp_path / "probabilities.json"
    names = lt.find_layers(model).names
    pi = (0.3, 0.7, 1.0)
    SamplingProbabilities(
        model="m", layer_names=names, activated_layers=2, inclusion_probabilities=pi,
        scores=(None,) * 3, metric="grad_rms", gamma=1.0, mix=0.0, floor=0.1, cap=1.0, n_eff=None,
        source_runs=("r",), verdict="", created="2026-01-01T00:00:00+00:00",
    ).save(file)  # fmt: skip
    scans, reads = [], []
    stacks, load_file = layer_map.stacks, SamplingProbabilities.load
    monkeypatch.setattr(layer_map, "stacks", lambda m: scans.append(m) or stacks(m))
    monkeypatch.setattr(
        SamplingProbabilities, "load", lambda path: reads.append(path) or load_file(path)
    )
    config = lt.LisaConfig(2, 1, "systematic", probabilities=str(file))
    trainer = Trainer(
        model, arguments(tmp_path / "out", max_steps=3, optim="adamw_bnb_8bit"),
        train_dataset=examples(),
    )  # fmt: skip
    lt.attach(
        trainer, lisa=config if with_lisa else None, eight_bit_states=("layers",),
        record=lt.RecordConfig(str(tmp_path / "run"), every=1),
    )  # fmt: skip
    trainer.train()
    assert (len(scans), len(reads)) == (1, int(with_lisa))
    run = load(tmp_path / "run")
    assert [entry["name"] for entry in run.manifest["layers"]] == list(names)
    if with_lisa:
        assert run.manifest["lisa"]["probabilities"] == str(file)
        alone = lt.LisaCallback(config)  # finds and reads for itself
        other = Trainer(llama(), arguments(tmp_path / "o", max_steps=1), train_dataset=examples())
        other.add_callback(alone)
        other.train()
        draws = run.events[run.events["event"] == "lisa_draw"]
        exact = tuple(alone.engine.inclusion_probabilities)
        assert all(tuple(given) == exact for given in draws["inclusion_probabilities"])
        return
    (tmp_path / "run").rename(tmp_path / "first")
    trainer.train()
    assert len(scans) == 1
    (tmp_path / "run").rename(tmp_path / "second")
    del model.model.layers[2]
    trainer.train()
    assert len(scans) == 2
    assert len(load(tmp_path / "run").manifest["layers"]) == 2
