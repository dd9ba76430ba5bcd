"""The peak: against the CPU allocator's own record of a real step, and its behaviour."""

import inspect
import itertools
from dataclasses import fields, replace

import helpers_memory as small
import pytest
import torch

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.patterns import lisa_pattern, plain_pattern
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import record_step

# Large enough that what kernels allocate for themselves is small beside it.
WIDE = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 2000,
        "num_key_value_heads": 4}  # fmt: skip
BATCH, LENGTH = 4, 96
BASE = Setting(method="full", batch_size=BATCH, sequence_length=LENGTH, dtype="float32")


def allocator_peak(model, batch) -> int:
    """Most bytes above the start that one forward and backward pass has allocated at once."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        loss = model(**batch).loss
        loss.backward()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return top


@pytest.mark.parametrize("checkpointing", [None, "all", "frozen"], ids=str)
@pytest.mark.parametrize("layers", [None, (0, 2), (3,)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_peak_of_both_passes_is_the_allocators(family, layers, checkpointing):
    config = small.FAMILIES[family](**WIDE)
    lisa = lt.LisaConfig(1, always_active=("head",), recompute=checkpointing or "all")
    setting = replace(
        BASE, method="full" if layers is None else "lisa", attn_implementation="eager",
        gradient_checkpointing=checkpointing is not None, lisa=lisa,
    )  # fmt: skip
    if layers is None:
        setting = replace(setting, lisa=lt.LisaConfig())
    stage = Stage(config, setting)
    pattern = plain_pattern(stage) if layers is None else lisa_pattern(stage, setting, layers)
    trace = record_step(stage, setting, pattern)
    live = trace.live()[trace.marks["start"] :]
    predicted = int(live.max() - live[0])

    model = small.real_model(config, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in pattern.trainable)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if checkpointing == "frozen":
        for layer in layers or ():
            model.model.layers[layer].gradient_checkpointing = False
    measured = allocator_peak(model, small.batch_for(model, BATCH, LENGTH))
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_total_is_the_largest_phase_and_below_the_sum_of_the_parts():
    found = lt.estimate_memory(small.llama(**WIDE), "full", batch_size=4, sequence_length=96)
    device = found.fullest
    parts = (device.weights, device.gradients, device.optimizer, device.activations, device.logits)
    assert found.total == max(device.phases.values())
    assert device.weights + device.optimizer < found.total < sum(parts) + device.gradients


def test_the_step_of_foreach_adamw_is_the_peak_of_a_short_sequence():
    options = {"sequence_length": 8, "dtype": "float32"}
    config = small.llama(**WIDE)
    foreach = lt.estimate_memory(config, "full", optim="adamw_torch", **options).fullest
    fused = lt.estimate_memory(config, "full", optim="adamw_torch_fused", **options).fullest
    assert foreach.peak_phase == "step"
    # Weights, gradients, two moments, and the copy that foreach makes of the second.
    assert foreach.phases["step"] == pytest.approx(5 * foreach.weights, rel=0.01)
    assert fused.phases["step"] == pytest.approx(4 * foreach.weights, rel=0.01)


def test_a_step_inside_backward_never_holds_all_gradients():
    config = small.llama(**WIDE)
    options = {"sequence_length": 32, "dtype": "float32", "optim": "sgd"}
    whole = lt.estimate_memory(config, "full", **options)
    plain = whole.fullest
    inside = lt.estimate_memory(config, "full", step_in_backward=True, **options).fullest
    assert plain.gradients == 4 * whole.parameters
    assert inside.gradients == 4 * WIDE["vocab_size"] * WIDE["hidden_size"]
    assert inside.peak < plain.peak
    assert "step" not in inside.phases


def test_accumulated_gradients_stand_during_the_forward_pass():
    config = small.llama(**WIDE)
    once = lt.estimate_memory(config, "full", sequence_length=32).fullest
    twice = lt.estimate_memory(
        config, "full", sequence_length=32, gradient_accumulation_steps=2
    ).fullest
    assert twice.phases["forward"] == once.phases["forward"] + once.gradients
    assert twice.gradients == once.gradients


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_chunks_never_hold_the_logits(tied):
    config = small.llama(**{**WIDE, "vocab_size": 60_000}, tie_word_embeddings=tied)
    options = {"sequence_length": 96, "batch_size": 4, "dtype": "bfloat16", "lora": {"r": 4}}
    plain = lt.estimate_memory(config, "lora", **options).fullest
    chunked = lt.estimate_memory(config, "lora", chunked_loss=True, **options).fullest
    tokens = 4 * 96
    assert plain.logits > tokens * 60_000 * (2 + 4 + 4)
    assert chunked.logits < tokens * 32_768 * 2 * 1.5  # one tile


def test_a_head_that_trains_is_summed_in_slices(monkeypatch):
    """TRL sums its gradient in fp32: more than whole logits of few tokens, were it done at once."""
    config = small.llama(**{**WIDE, "vocab_size": 60_000})
    options = {"sequence_length": 32, "dtype": "bfloat16", "optim": "sgd"}
    plain = lt.estimate_memory(config, "full", **options).fullest
    sliced = lt.estimate_memory(config, "full", chunked_loss=True, **options).fullest
    monkeypatch.setattr("lisa_train.trainer.trl_head.SLICE", 60_000)
    at_once = lt.estimate_memory(config, "full", chunked_loss=True, **options).fullest
    head = 60_000 * WIDE["hidden_size"]
    assert at_once.logits > 4 * head
    assert at_once.peak > plain.peak
    assert sliced.logits < 2 * head + 4 * 8192 * WIDE["hidden_size"] + 32 * 32_768 * 2 * 1.5
    assert sliced.peak < at_once.peak - head
    assert sliced.peak < plain.peak + 1000  # which lies where all gradients stand


def test_the_worst_draw_is_the_worst_of_all_draws():
    config = small.llama()
    options = {"sequence_length": 32, "lisa": lt.LisaConfig(1, always_active=())}
    worst = lt.estimate_memory(config, "lisa", **options)
    totals = [
        lt.estimate_memory(config, "lisa", active_layers=(i,), **options).total for i in range(4)
    ]
    assert worst.total == max(totals)
    assert worst.active_layers == (0,)
    # One layer of four, each as often as any other.
    assert worst.mean == pytest.approx(sum(totals) / 4, rel=0.05)


@pytest.mark.parametrize("inside", [False, True], ids=["step-after", "step-in-backward"])
@pytest.mark.parametrize("always", [(), ("embed", "head", "norm")], ids=["alone", "E+H"])
@pytest.mark.parametrize("layers", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_no_draw_of_two_layers_costs_more_than_the_worst(layers, always, inside):
    """With checkpointing the inputs of all layers stand when backward begins: at the top."""
    config = small.llama(num_hidden_layers=layers)
    options = {
        "sequence_length": 128, "dtype": "bfloat16", "gradient_checkpointing": True,
        "step_in_backward": inside, "lisa": lt.LisaConfig(2, always_active=always),
    }  # fmt: skip
    found = lt.estimate_memory(config, "lisa", **options)
    totals = [
        lt.estimate_memory(config, "lisa", active_layers=pair, **options).total
        for pair in itertools.combinations(range(layers), 2)
    ]
    assert found.total == max(totals)
    assert found.mean <= found.total


def test_with_the_embeddings_on_all_draws_cost_the_same():
    found = lt.estimate_memory(small.llama(), "lisa", sequence_length=32)
    assert found.mean == pytest.approx(found.total, rel=1e-3)


@pytest.mark.parametrize(("family", "group"), [(small.bert, "norm"), (small.opt, "other")])
def test_with_anything_on_below_the_layers_all_draws_cost_the_same(family, group):
    """BERT's norm of the embeddings, OPT's projection of them: gradients pass every layer."""
    options = {"sequence_length": 32, "lisa": lt.LisaConfig(1, always_active=(group,))}
    found = lt.estimate_memory(family(), "lisa", **options)
    assert found.mean == pytest.approx(found.total, rel=3e-3)
    rest = {"sequence_length": 32, "lisa": lt.LisaConfig(1, always_active=())}
    resting = lt.estimate_memory(family(), "lisa", **rest)
    assert resting.mean < 0.99 * resting.total


def test_drawn_embeddings_count_in_the_worst_case_and_in_part_in_the_mean():
    config = small.llama()
    options = {"sequence_length": 32, "optim": "adamw_torch"}
    on = lt.LisaConfig(1)
    drawn = lt.LisaConfig(1, always_active=("head", "norm"), embed_probability=0.25)
    off = lt.LisaConfig(1, always_active=("head", "norm"))
    sizes = {
        name: lt.estimate_memory(config, "lisa", lisa=lisa, **options)
        for name, lisa in (("on", on), ("drawn", drawn), ("off", off))
    }
    assert sizes["drawn"].total == sizes["on"].total
    assert sizes["off"].mean < sizes["drawn"].mean < sizes["on"].total


def test_bernoulli_draws_may_train_every_layer():
    found = lt.estimate_memory(
        small.llama(), "lisa", sequence_length=16, lisa=lt.LisaConfig(1, sampling="bernoulli")
    )
    assert found.active_layers == (0, 1, 2, 3)
    assert found.mean < found.total


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "loar"}, "Did you mean 'lora'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence_lenght": 9}, "Did you mean 'sequence_length'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"optim": "adam"}, "optim is 'adam'"),
        ({"active_layers": (9,)}, "active_layers holds 9"),
        ({"method": "lora", "lora": {"target_modules": ["nowhere"]}}, "PEFT refuses"),
        ({"step_in_backward": True, "gradient_accumulation_steps": 2}, "set it to 1"),
        ({"lisa": lt.LisaConfig(9)}, "activated_layers"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_words(changes, words):
    settings = {"sequence_length": 16, **changes}
    with pytest.raises(ConfigError, match=words):
        lt.estimate_memory(small.llama(), settings.pop("method", "lisa"), **settings)


def test_the_signature_is_that_of_a_setting():
    """The same names with the same defaults; None stands for what a dataclass makes anew."""
    taken = inspect.signature(lt.estimate_memory).parameters
    given = {n: p.default for n, p in taken.items() if p.default is not p.empty}
    made = {"lisa": lt.LisaConfig(), "lora": {}, "peft": {}, "select": lt.SelectConfig()}
    assert given | made == {f.name: getattr(Setting(), f.name) for f in fields(Setting)}


def test_a_sequence_beyond_the_table_of_positions_is_refused():
    with pytest.raises(ConfigError, match="has 128 positions"):
        lt.estimate_memory(small.gpt2(), "full", sequence_length=129)


def test_experts_that_are_chosen_by_value_are_refused_in_words():
    config = small.mixtral(experts_implementation="eager", dtype="bfloat16")
    with pytest.raises(ConfigError, match="by the values of its inputs"):
        lt.estimate_memory(config, "full", sequence_length=16)


def test_experts_in_fp32_are_refused_in_words():
    with pytest.raises(ConfigError, match="bfloat16 only"):
        lt.estimate_memory(small.mixtral(), "full", sequence_length=16)


def test_a_wrapped_or_quantized_model_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small.real_model(small.llama()), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="wrapped in PeftModel"):
        lt.estimate_memory(model, "lora")


@pytest.mark.parametrize("family", [*small.FAMILIES, "t5", "mixtral"])
@pytest.mark.parametrize("method", ["full", "lisa"])
def test_every_family_has_an_estimate(family, method):
    config = getattr(small, family)()
    found = lt.estimate_memory(config, method, sequence_length=16, dtype="bfloat16")
    assert found.total > found.fullest.weights > 0
    assert found.fullest.activations > 0


def test_what_is_shown():
    found = lt.estimate_memory(small.llama(), "lisa", sequence_length=16)
    assert "LlamaForCausalLM, lisa: 0.00 GB" in repr(found)
    assert len(repr(found)) < 200
    assert "<table" in found._repr_html_()
    frame = found.to_frame()
    assert frame["total"].tolist() == [found.total]
    assert found.fits(found.needs())
    assert not found.fits(found.needs() - 1)
