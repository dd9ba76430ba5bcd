"""What a run directory says of LISA: notices, draws without gradient, coverage."""

import helpers_architectures as known
import numpy as np
import torch
from helpers_recording import arguments
from transformers import Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.rundir.run import load


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
    assert "LISA trains in every interval what is neither layer, embedding, head nor" in said[0]
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
