"""Every fault planted in a real training run is found by its rule; healthy runs are silent."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_recording import examples, llama

import lisa_analysis as la
from lisa_analysis.plans.sampling import inclusion_probabilities
from lisa_train.config import LisaConfig, RecordConfig
from lisa_train.measure.recorder import NormRecorder
from lisa_train.measure.step.step_measure import StepMeasure
from lisa_train.methods.lisa.engine import Lisa

LAYERS = 4
STEPS = 40
# Timings of a tiny model on a shared machine say nothing about the rule on cost: it has a test of
# its own, with a clock of its own.
UNTIMED = {"recorder_cost"}

BATCHES = [
    {key: torch.stack([a[key], b[key]]) for key in a}
    for a, b in zip(examples()[::2], examples()[1::2], strict=True)
]


@dataclass
class Training:
    """A plain loop with places where a test can break it."""

    path: Path
    method: str = "full"
    model: Any = None
    steps: int = STEPS
    rate: float = 2e-4
    clip: float = 1e9
    decay: float = 0.0
    lisa: LisaConfig | None = None
    close: bool = True
    parameters: Callable[[Any], list[Any]] = field(default=lambda model: list(model.parameters()))
    on_gradients: Callable[[int, Any], None] = field(default=lambda step, model: None)
    on_begin: Callable[[int, Any, Any], None] = field(default=lambda step, model, optimizer: None)
    logged: Callable[[float, float], float] = field(default=lambda before, after: before)

    def run(self) -> Any:
        model = self.model or llama(layers=LAYERS)
        optimizer = torch.optim.AdamW(self.parameters(model), lr=self.rate, weight_decay=self.decay)
        recorder = NormRecorder(model, optimizer, RecordConfig(str(self.path), every=1))
        engine = None
        if self.lisa is not None:
            engine = Lisa(model, optimizer, self.lisa, on_draw=lambda draw: recorder.event(
                "lisa_draw", draw.step, layers=list(draw.layers), visits=list(draw.visits),
                inclusion_probabilities=list(draw.inclusion_probabilities),
            ))  # fmt: skip
        for step in range(1, self.steps + 1):
            if engine is not None:
                engine.begin_step(step - 1)
            self.on_begin(step, model, optimizer)
            loss = model(**BATCHES[step % len(BATCHES)]).loss
            loss.backward()
            self.on_gradients(step, model)
            recorder.before_step(step)
            before = torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            coefficient = min(1.0, self.clip / (float(before) + 1e-6))
            optimizer.step()
            grad_norm = self.logged(float(before), float(before) * coefficient)
            recorder.after_step(step, loss=loss, clip_coef=coefficient, grad_norm=grad_norm)
            optimizer.zero_grad()
        recorder.writer.update_manifest(method=self.method)
        if self.close:
            recorder.close()
        else:
            recorder.flush(everything=True)
        if engine is not None:
            engine.close()
        return la.load(self.path)


def found(run: Any, rule: str) -> Any:
    return la.diagnose(run)[rule]


def lora(path: Path, **changes: Any) -> Training:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(layers=LAYERS), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    trainable = {"parameters": lambda m: [p for p in m.parameters() if p.requires_grad]}
    return Training(path, "lora", model, **(trainable | changes))


def lisa(path: Path, k: int = 2, interval: int = 4, **changes: Any) -> Training:
    sampling = changes.pop("sampling", "balanced")
    probabilities = changes.pop("probabilities", None)
    config = LisaConfig(
        activated_layers=k, interval_steps=interval, sampling=sampling, probabilities=probabilities
    )
    return Training(path, "lisa", lisa=config, **changes)


@pytest.mark.parametrize("training", [Training, lora, lisa])
def test_healthy_runs_are_silent(tmp_path, training):
    diagnostics = la.diagnose(training(tmp_path / "run").run())
    loud = {f.id: f.evidence for f in diagnostics.findings if f.state != "ok"}
    assert {rule: text for rule, text in loud.items() if rule not in UNTIMED} == {}


def layer_of(model: Any, index: int) -> Any:
    return model.model.layers[index]


def test_a_layer_that_the_optimizer_does_not_have(tmp_path):
    def all_but_one(model):
        lost = set(layer_of(model, 1).parameters())
        return [p for p in model.parameters() if p not in lost]

    finding = found(Training(tmp_path / "run", parameters=all_but_one).run(), "sampled_not_updated")
    assert (finding.state, finding.layers) == ("fail", (1,))


def test_a_layer_that_something_else_unfroze(tmp_path):
    def meddle(step, model, optimizer):
        if step == 6:
            for parameter in model.parameters():
                parameter.requires_grad_(True)

    finding = found(lisa(tmp_path / "run", on_begin=meddle).run(), "schedule_mismatch")
    assert (finding.state, finding.step) == ("fail", 6)


def test_a_trainer_that_logs_the_norm_after_clipping(tmp_path):
    run = Training(tmp_path / "run", clip=0.5, logged=lambda before, after: after).run()
    assert found(run, "norm_mismatch").state == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(tmp_path, value):
    def poison(step, model):
        if step == 7:
            layer_of(model, 2).mlp.down_proj.weight.grad[0, 0] = value

    run = Training(tmp_path / "run", steps=12, on_gradients=poison).run()
    finding = found(run, "non_finite")
    assert (finding.state, finding.layers, finding.step) == ("fail", (2,), 7)
    assert "grad_norm" in finding.evidence or "mlp.down_proj" in finding.evidence


def test_clipping_at_every_step(tmp_path):
    assert found(Training(tmp_path / "run", clip=0.01).run(), "clip_pressure").state == "warn"


def test_bfloat16_weights_that_swallow_the_step(tmp_path):
    run = Training(tmp_path / "run", rate=1e-6, model=llama(layers=LAYERS).bfloat16()).run()
    finding = found(run, "bf16_stall")
    assert finding.state == "warn"
    large = Training(tmp_path / "large", rate=1e-2, model=llama(layers=LAYERS).bfloat16()).run()
    assert found(large, "bf16_stall").state == "ok"


def test_a_learning_rate_off_by_orders_of_magnitude(tmp_path):
    finding = found(Training(tmp_path / "run", steps=15, rate=0.05).run(), "update_ratio")
    assert finding.state in ("info", "warn")


def test_gradients_that_explode_with_depth(tmp_path):
    def explode(step, model):
        for parameter in layer_of(model, 0).parameters():
            parameter.grad *= 1e4

    finding = found(Training(tmp_path / "run", on_gradients=explode).run(), "depth_imbalance")
    assert finding.state == "info"
    assert finding.layers[0] == 0


def test_a_jump_at_every_activation(tmp_path):
    def jump(step, model, optimizer):
        optimizer.param_groups[0]["lr"] = 2e-2 if (step - 1) % 4 == 0 else 2e-4

    finding = found(lisa(tmp_path / "run", on_begin=jump).run(), "reactivation_spike")
    assert finding.state == "warn"


def test_an_adapter_with_both_halves_zero(tmp_path):
    training = lora(tmp_path / "run")
    adapter = layer_of(training.model.base_model.model, 3).mlp.down_proj.lora_A["default"]
    torch.nn.init.zeros_(adapter.weight)
    finding = found(training.run(), "lora_dead")
    assert (finding.state, finding.layers) == ("fail", (3,))


def test_an_adapter_half_that_is_frozen(tmp_path):
    training = lora(tmp_path / "run")
    layer_of(training.model.base_model.model, 1).mlp.down_proj.lora_A.requires_grad_(False)
    finding = found(training.run(), "lora_dead")
    assert (finding.state, finding.layers) == ("warn", (1,))


def test_layers_that_are_never_drawn(tmp_path):
    finding = found(lisa(tmp_path / "run", k=1, steps=8).run(), "coverage")
    assert finding.state == "warn"
    assert len(finding.layers) == 2


def test_weights_that_drift_away(tmp_path):
    run = Training(tmp_path / "run", rate=1e-2, decay=0.5).run()
    assert found(run, "weight_drift").state == "warn"


def test_a_run_that_was_killed(tmp_path):
    finding = found(Training(tmp_path / "run", steps=6, close=False).run(), "log_gaps")
    assert finding.state in ("warn", "info")
    assert finding.evidence.startswith("The run is")


class Clock:
    """A clock that only the test winds: what a machine does meanwhile takes no time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.mark.parametrize(
    ("measuring", "state", "share"), [(0.25, "info", "20.0%"), (0.02, "ok", "2.0%")]
)
@pytest.mark.parametrize("training", [Training, lora, lisa])
def test_a_recorder_that_takes_too_long(tmp_path, monkeypatch, training, measuring, state, share):
    """Each step trains for one second; a slow device makes the measuring take `measuring`."""
    clock, gradients = Clock(), StepMeasure.gradients

    def slow(self, *args, **kwargs):
        clock.now += measuring
        return gradients(self, *args, **kwargs)

    def train(step, model):
        clock.now += 1.0

    for module in ("cadence", "recorder", "recording_time", "scalar_lines"):
        monkeypatch.setattr(f"lisa_train.measure.{module}.time", clock, raising=False)
    monkeypatch.setattr(StepMeasure, "gradients", slow)
    finding = found(training(tmp_path / "run", steps=6, on_gradients=train).run(), "recorder_cost")
    assert finding.state == state
    assert share in finding.evidence


def test_a_loss_spike_after_one_wild_step(tmp_path):
    def wild(step, model):
        if step == 50:
            for parameter in layer_of(model, 2).parameters():
                parameter.grad *= 1e3

    def rate(step, model, optimizer):
        optimizer.param_groups[0]["lr"] = 10.0 if step == 50 else 2e-4

    run = Training(tmp_path / "run", steps=60, on_gradients=wild, on_begin=rate).run()
    finding = found(run, "loss_spikes")
    assert finding.state == "warn"
    assert finding.layers == (2,)
    assert "at step 50" in finding.evidence


class TestProbabilitiesReachTheSchedule:
    """A profile's file drives the next run, and the next analysis confirms it."""

    def test_declared_and_observed_visits_agree(self, tmp_path):
        profile = la.importance(Training(tmp_path / "pilot").run(), "grad_rms")
        made = la.sampling_probabilities(profile, 2, use_intervals=False, gamma=2.0)
        path = made.save(tmp_path / "probabilities.json")
        run = lisa(tmp_path / "run", interval=1, steps=120, sampling="systematic",
                   probabilities=str(path)).run()  # fmt: skip
        events = run.events[run.events["event"] == "lisa_draw"]
        assert len(events) == 120
        for declared in events["inclusion_probabilities"]:
            np.testing.assert_allclose(declared, made.inclusion_probabilities, atol=1e-12)
        assert np.ptp(made.inclusion_probabilities) > 0.05
        finding = found(run, "visits")
        assert finding.state == "ok", finding.evidence

    def test_a_schedule_that_ignores_its_file_is_found(self, tmp_path, monkeypatch):
        """The engine declares the file's π; the draw is replaced by a uniform one."""
        pi = inclusion_probabilities(np.array([8.0, 1, 1, 1]), 2, floor=0.1)
        rng = np.random.default_rng(0)

        def uniform(self, index):
            return tuple(sorted(rng.choice(LAYERS, 2, replace=False).tolist()))

        from lisa_train.methods.lisa import samplers

        config = LisaConfig(activated_layers=2, interval_steps=1, sampling="systematic",
                            probabilities=tuple(pi.tolist()))  # fmt: skip
        sampler = type(samplers.make_sampler("systematic", pi, 2, 0))
        monkeypatch.setattr(sampler, "draw", uniform)
        run = Training(tmp_path / "run", "lisa", lisa=config, steps=150).run()
        assert found(run, "visits").state == "warn"
