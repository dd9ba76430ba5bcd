"""What recording costs: time as a share of the step, memory, bytes on the disk."""

import gc
import statistics
import time

import pytest
import torch
from helpers_recording import examples, llama
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lisa_train as lt
from lisa_analysis.rundir.opening import load
from lisa_train.model import compiled

pytestmark = pytest.mark.benchmark

# The demo's model (SmolLM2-135M) and a wider one.
SHAPES = {
    "demo": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "wide": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 2,
             "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 4096},
}  # fmt: skip
TOKENS = (4, 256)
# Steps as small as the demo's: the worst case, because recording does not shrink with the batch.
FEW = (4, 48)
# Largest share of a step, recording included, that recording every quantity may take: the aim for
# few tokens. Of one thread with two cores for itself 6.1, 2.4 and 1.5 % were measured.
MOST = {TOKENS: {"full": 0.03, "lisa": 0.02, "lora": 0.02},
        FEW: {"full": 0.08, "lisa": 0.03, "lora": 0.03}}  # fmt: skip
# Where no compiler makes the sums, as they were held before there was one.
MOST_BY_TORCH = {TOKENS: {"full": 0.05, "lisa": 0.05, "lora": 0.05},
                 FEW: {"full": 0.11, "lisa": 0.045, "lora": 0.03}}  # fmt: skip


def build(shape, method="full", tokens=TOKENS):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    train = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(train, 1e-4, foreach=False, fused=True)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], tokens)
    return model, optimizer, ids


def train_step(model, optimizer, ids, step, recorder=None):
    model(input_ids=ids, labels=ids).loss.backward()
    if recorder is not None:
        recorder.before_step(step, undo=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if recorder is not None:
        recorder.after_step(step, clip_coef=(1 / (norm + 1e-6)).clamp(max=1), grad_norm=norm)
    optimizer.zero_grad()


@pytest.mark.parametrize("method", ["full", "lisa", "lora"])
@pytest.mark.parametrize(("shape", "tokens"), [("demo", FEW), ("demo", TOKENS), ("wide", TOKENS)])
def test_time(tmp_path, shape, tokens, method):
    """Processor time of the recorder as a share of that of the step, recording included.

    Recording reads the weights that train a few times, whatever the batch: the share falls with
    the tokens of a step.
    """
    model, optimizer, ids = build(shape, method, tokens)
    config = lt.LisaConfig(activated_layers=2 if shape == "demo" else 1)
    engine = lt.Lisa(model, optimizer, config) if method == "lisa" else None
    recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1))
    shares = []
    for step in range(1, 8):
        if engine is not None:
            engine.begin_step(step - 1)
        spent = {"recorder": 0.0}
        for name in ("before_step", "after_step"):
            spent_in(recorder, name, spent)
        begin = time.process_time()
        train_step(model, optimizer, ids, step, recorder)
        shares.append(spent["recorder"] / (time.process_time() - begin))
        for name in ("before_step", "after_step"):
            delattr(recorder, name)
    share = statistics.median(shares[1:])
    print(f"\n{shape} {method}, {ids.numel()} tokens: {share:.2%} of a recorded step, "
          f"{share / 10:.2%} at every=10")  # fmt: skip
    most = MOST if compiled.prepare() else MOST_BY_TORCH
    assert share <= most[tokens][method]


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_time_with_gradient_noise(tmp_path, method):
    """Everything on: four micro-batches of 256 tokens, each gradient looked at as it arrives."""
    model, optimizer, ids = build("demo", method)
    engine = lt.Lisa(model, optimizer, lt.LisaConfig(2)) if method == "lisa" else None
    config = lt.RecordConfig(str(tmp_path), every=1, grad_noise=True)
    recorder = lt.NormRecorder(model, optimizer, config)
    noise = recorder._measure._noise
    shares = []
    for step in range(1, 5):
        if engine is not None:
            engine.begin_step(step - 1)
        spent = {"recorder": 0.0}
        timed = [(recorder, n) for n in ("micro_batch", "before_step", "after_step")]
        timed.append((noise, "_arrive"))  # within the backward pass
        for owner, name in timed:
            spent_in(owner, name, spent)
        begin = time.process_time()
        for row in ids[:3]:
            (model(input_ids=row[None], labels=row[None]).loss / 4).backward()
            recorder.micro_batch(step)
        row = ids[3:]
        (model(input_ids=row, labels=row).loss / 4).backward()
        recorder.before_step(step, undo=True)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recorder.after_step(step, clip_coef=(1 / (norm + 1e-6)).clamp(max=1), grad_norm=norm)
        optimizer.zero_grad()
        shares.append(spent["recorder"] / (time.process_time() - begin - spent["recorder"]))
        for owner, name in timed:
            delattr(owner, name)
    recorder.close()
    share = statistics.median(shares[1:])
    print(f"\n{method} with gradient noise: {share:.2%} of a recorded step")
    assert load(tmp_path).metrics(["grad_noise"])["grad_noise"].notna().any()
    assert share <= 0.05


def spent_in(recorder, name, spent):
    original = getattr(recorder, name)

    def timed(*args, **kwargs):
        begin = time.process_time()
        original(*args, **kwargs)
        spent["recorder"] += time.process_time() - begin

    setattr(recorder, name, timed)


def test_memory_is_flat_over_ten_thousand_steps(tmp_path):
    """Live bytes of tensors after 100 and after 10,000 recorded steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[
        torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)) for _ in range(4)
    ])  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    model(torch.randn(4, 16)).sum().backward()
    live = {}
    config = lt.RecordConfig(str(tmp_path), every=1, flush_seconds=0.2)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, 10_001):
            recorder.before_step(step)
            optimizer.step()
            recorder.after_step(step, loss=torch.tensor(1.0))
            if step in (100, 10_000):
                recorder.flush()
                gc.collect()
                live[step] = tensor_bytes(), resident()
    print(f"\n{live}")
    assert live[10_000][0] <= live[100][0] + 4096
    assert live[10_000][1] <= live[100][1] + 40e6
    assert load(tmp_path).scalars["step"].iloc[-1] == 10_000


def tensor_bytes():
    return sum(o.nbytes for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


def resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * 4096


def test_memory_of_a_recorded_step_is_that_of_the_active_tensors(tmp_path):
    """Copies are made of what trains, and of nothing else."""
    model, optimizer, ids = build("demo")
    engine = lt.Lisa(model, optimizer, lt.LisaConfig(activated_layers=1))
    recorder = lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path), every=1))
    engine.begin_step(0)
    model(input_ids=ids, labels=ids).loss.backward()
    active = sum(p.nbytes for p in model.parameters() if p.grad is not None)
    everything = sum(p.nbytes for p in model.parameters())
    before = tensor_bytes()
    recorder.before_step(1, undo=True)
    extra = tensor_bytes() - before
    print(
        f"\nextra {extra / active:.2f} of the active tensors, which are {active / everything:.2f}"
    )
    assert extra <= 1.01 * active
    assert active < 0.5 * everything


def test_bytes_on_the_disk(tmp_path):
    """Every quantity of a real training run, in one shard; a shard of its own adds 3 kB."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.stack([row["input_ids"] for row in examples(64)])
    config = lt.RecordConfig(str(tmp_path), every=1, flush_seconds=1e9)
    with lt.NormRecorder(model, optimizer, config) as recorder:
        for step in range(1, 301):
            start = 2 * step % 60
            train_step(model, optimizer, ids[start : start + 4], step, recorder)
    files = sorted((tmp_path / "metrics").iterdir())
    rows = len(load(tmp_path).metrics(["grad_norm"], steps=slice(1, None)))
    size = sum(file.stat().st_size for file in files[1:])
    print(f"\n{size / rows:.1f} bytes per recorded tensor and step")
    assert size / rows <= 12
