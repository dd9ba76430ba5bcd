"""Managed memory of paged optimizers, which nobody frees: a stand-in for CUDA's counts it."""

import gc
import io

import pytest
import torch
from helpers_recording import llama

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.cards import Card
from lisa_train.estimate.table import MethodTable
from lisa_train.optim import paged_state

bitsandbytes = pytest.importorskip("bitsandbytes")

import bitsandbytes.functional as functional  # noqa: E402

SIDE = 320  # 320 · 320 elements: bitsandbytes pages tensors of at least 100,000


class _OnDevice:
    """A tensor's shape, on the device that bitsandbytes would page from."""

    def __init__(self, tensor):
        self.shape, self.device = tensor.shape, torch.device("cuda", 0)
        self.numel, self.size = tensor.numel, tensor.size


class _Managed:
    """CUDA's managed memory: never freed, full of what was there before."""

    def __init__(self):
        self.bytes = 0
        self._buffers = {}

    def get_paged(self, *shape, dtype=torch.float32, device=None):
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((size,), 0xA5, dtype=torch.uint8).view(dtype).view(shape)
        self.bytes += size
        self._buffers[buffer.data_ptr()] = buffer
        buffer.is_paged, buffer.page_deviceid = True, device.index
        return buffer

    def holds(self, tensor):
        return tensor.data_ptr() in self._buffers

    def prefetch_tensor(self, tensor, to_cpu=False):
        assert self.holds(tensor), "prefetches what is not managed memory: an error of CUDA's"


@pytest.fixture
def managed(monkeypatch):
    memory = _Managed()
    monkeypatch.setattr(functional, "get_paged", memory.get_paged)
    monkeypatch.setattr(functional, "fill", lambda tensor, value: tensor.fill_(value))
    monkeypatch.setattr(functional, "prefetch_tensor", memory.prefetch_tensor)
    monkeypatch.setattr(functional.GlobalPageManager, "_instance", None)
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)
    if hasattr(paged_state, "_pool"):
        monkeypatch.setattr(paged_state, "_pool", paged_state._Pool())
    return memory


def paging(kind):
    """Let an optimizer of bitsandbytes page tensors that lie on the CPU, by its own code."""

    class Paging(kind):
        _cpu_paged_warned = True

        def get_state_buffer(self, p, dtype=torch.float32):
            where = _OnDevice(p) if self.is_paged and p.numel() >= 1e5 else p
            return super().get_state_buffer(where, dtype=dtype)

    return Paging


AdamW = paging(bitsandbytes.optim.PagedAdamW8bit)


class Blocks(torch.nn.Module):
    """Layers of two square matrices and one of their own width."""

    def __init__(self, widths):
        super().__init__()
        self.embed = torch.nn.Linear(8, SIDE)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "up": torch.nn.Linear(SIDE, width, bias=False),
                    "down": torch.nn.Linear(width, SIDE, bias=False),
                    "mix": torch.nn.Linear(SIDE, SIDE),
                }
            )
            for width in widths
        )

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer["mix"](torch.tanh(layer["down"](layer["up"](x))))
        return x.square().mean()


def blocks(widths=(SIDE,) * 6):
    torch.manual_seed(0)
    return Blocks(widths)


def settings(**changes):
    return lt.LisaConfig(
        **{"activated_layers": 2, "interval_steps": 1, "always_active": (), "seed": 3, **changes}
    )


def inputs(step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def train(engine, model, optimizer, steps, after=lambda step: None):
    for step in steps:
        engine.begin_step(step)
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def states(model, optimizer):
    """Every (parameter, state tensor) of at least a paged size in the optimizer."""
    return [
        value
        for p in model.parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if key in ("state1", "state2") and p.numel() >= 1e5
    ]


@pytest.mark.parametrize(
    ("kind", "per_element"),
    [
        ("PagedAdamW8bit", 2), ("PagedAdamW32bit", 8), ("PagedLion8bit", 1),
        ("PagedAdEMAMix8bit", 3),
    ],
)  # fmt: skip
def test_reset_holds_the_layers_of_one_draw(managed, kind, per_element):
    model = blocks()
    optimizer = paging(getattr(bitsandbytes.optim, kind))(model.parameters(), lr=1e-3)
    if "AdEMAMix" in kind:
        double = type(optimizer)._get_state_double_buffer
        optimizer._get_state_double_buffer = lambda p, dtype: double(
            optimizer, _OnDevice(p) if p.numel() >= 1e5 else p, dtype
        )
    held, drawn = [], set()

    def look(_):
        held.append(managed.bytes)
        drawn.update(engine.active_layers)

    with lt.Lisa(model, optimizer, settings()) as engine:
        train(engine, model, optimizer, range(12), look)
    assert drawn == set(range(6))
    # two layers of three matrices
    assert set(held) == {2 * 3 * SIDE * SIDE * per_element}


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_paged_state_trains_as_state_that_is_not_paged(managed, policy):
    trained = []
    for kind in (AdamW, bitsandbytes.optim.AdamW8bit):
        model = blocks()
        optimizer = kind(model.parameters(), lr=1e-3)
        with lt.Lisa(model, optimizer, settings(optimizer_state=policy)) as engine:
            train(engine, model, optimizer, range(10))
        trained.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    layers = 2 if policy == "reset" else 6
    assert managed.bytes == layers * 3 * SIDE * SIDE * 2


def test_layers_of_their_own_shapes_hold_no_more_than_kept_state(managed):
    widths = (320, 340, 360, 320, 340, 360)
    held = {}
    for policy in ("reset", "keep"):
        before = managed.bytes
        paged_state._pool = paged_state._Pool()  # the fixture puts the process's back
        model = blocks(widths)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        grown = []
        with lt.Lisa(model, optimizer, settings(optimizer_state=policy)) as engine:
            train(engine, model, optimizer, range(60), lambda _: grown.append(managed.bytes))  # noqa: B023
        held[policy] = managed.bytes - before
        assert grown[30] == grown[-1]
    assert held["keep"] == 2 * sum(2 * SIDE * w + SIDE * SIDE for w in widths)
    # at most two layers are drawn: two matrices of each size, and four of those of one width
    most = 2 * (2 * SIDE * SIDE + sum(2 * 2 * SIDE * w for w in (320, 340, 360)))
    assert held["reset"] <= most < held["keep"]


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_a_resumed_run_is_paged_and_identical(managed, policy):
    def build():
        model = blocks()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        config = settings(optimizer_state=policy, interval_steps=3)
        return model, optimizer, lt.Lisa(model, optimizer, config)

    model, optimizer, engine = build()
    train(engine, model, optimizer, range(8))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), engine.state_dict()], file)
    train(engine, model, optimizer, range(8, 14))
    expected = weights(model)
    engine.close()
    del engine, optimizer
    gc.collect()
    before = managed.bytes

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer, engine = build()
    resumed.load_state_dict(saved[0])
    for _ in range(3):  # as often as somebody loads
        optimizer.load_state_dict(saved[1])
    engine.load_state_dict(saved[2])
    assert states(resumed, optimizer)
    assert all(managed.holds(value) for value in states(resumed, optimizer))
    train(engine, resumed, optimizer, range(8, 14))
    assert all(managed.holds(value) for value in states(resumed, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(resumed), strict=True))
    # The memory of the first training serves the second; loading holds old and new at once, once.
    assert managed.bytes - before <= before
    settled = managed.bytes
    optimizer.load_state_dict(saved[1])
    train(engine, resumed, optimizer, range(14, 18))
    engine.close()
    assert managed.bytes == settled


def test_the_next_training_in_the_process_uses_the_same_memory(managed):
    held = []
    for _ in range(3):
        model = blocks()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        with lt.Lisa(model, optimizer, settings()) as engine:
            train(engine, model, optimizer, range(4))
        del model, optimizer, engine
        gc.collect()
        held.append(managed.bytes)
    assert held == [held[0]] * 3


def test_memory_in_use_is_lent_to_nobody_else(managed):
    pool, device = paged_state._Pool(), torch.device("cuda", 0)
    lent = pool.lend(managed.get_paged, 4, dtype=torch.uint8, device=device)
    part = lent.view(2, 2)[0]  # another tensor of the same memory outlives the first
    del lent
    other = pool.lend(managed.get_paged, 1, dtype=torch.float32, device=device)
    assert other.data_ptr() != part.data_ptr()
    del part
    again = pool.lend(managed.get_paged, 2, 2, dtype=torch.uint8, device=device)
    assert managed.bytes == 8
    assert (again.shape, again.is_paged, again.page_deviceid) == ((2, 2), True, 0)
    elsewhere = pool.lend(managed.get_paged, 4, dtype=torch.uint8, device=torch.device("cuda", 1))
    assert (managed.bytes, elsewhere.page_deviceid) == (12, 1)


@pytest.mark.parametrize("kind", [AdamW, bitsandbytes.optim.AdamW8bit])
def test_state_that_is_loaded_replaces_what_was_kept(managed, kind):
    """The loading of bitsandbytes tells torch's hooks nothing."""
    model = blocks()
    optimizer = kind(model.parameters(), lr=1e-3)
    with lt.Lisa(model, optimizer, settings(optimizer_state="keep")) as engine:
        train(engine, model, optimizer, range(8))
        saved = optimizer.state_dict()
        file = io.BytesIO()
        torch.save([saved, engine.state_dict(), model.state_dict()], file)
        train(engine, model, optimizer, range(8, 16))
        file.seek(0)
        first = torch.load(file, weights_only=True)
        model.load_state_dict(first[2])
        engine.load_state_dict(first[1])
        optimizer.load_state_dict(first[0])
        again = optimizer.state_dict()["state"]
        assert again.keys() == first[0]["state"].keys()
        for position, state in first[0]["state"].items():
            assert again[position]["step"] == state["step"]


def test_the_optimizer_is_plain_again_after_closing(managed):
    model = blocks()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    own = set(optimizer.__dict__)
    shared = optimizer.page_mng
    with lt.Lisa(model, optimizer, settings()) as engine:
        train(engine, model, optimizer, range(2))
        assert "init_state" in optimizer.__dict__
    assert set(optimizer.__dict__) == own
    assert optimizer.page_mng is shared
    assert functional.get_paged == managed.get_paged


def test_a_bitsandbytes_that_allocates_otherwise_is_refused(managed, monkeypatch):
    monkeypatch.delattr(functional, "get_paged")
    model = blocks()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match=r"has no functional.get_paged, .*adamw_bnb_8bit"):
        lt.Lisa(model, optimizer, settings())
    assert all(p.requires_grad for p in model.parameters())


def test_the_estimate_counts_what_many_draws_hold(managed):
    model = llama(layers=5, hidden_size=SIDE, intermediate_size=SIDE, vocab_size=400)
    for layer in model.model.layers[3:]:
        wide = llama(layers=1, hidden_size=SIDE, intermediate_size=400, vocab_size=8)
        layer.mlp = wide.model.layers[0].mlp
    config = settings(always_active=("head",), sampling="balanced")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(8)[None]
    drawn = set()
    with lt.Lisa(model, optimizer, config) as engine:
        for step in range(30):
            engine.begin_step(step)
            drawn.add(engine.active_layers)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {(0, 1), (3, 4)} <= drawn
    found = lt.estimate_memory(
        model, "lisa", sequence_length=8, optim="paged_adamw_8bit", lisa=config,
        eight_bit_states=("layers", "embed", "head", "norm"),
    )  # fmt: skip
    assert (found.paged, found.host) == (managed.bytes, managed.bytes)
    assert found.fits(found.needs())
    assert not found.fits_unpaged(found.needs())
    assert found.fits_unpaged(found.needs() + managed.bytes)
    sizes = {"paged": 0, "fits": managed.bytes, "no": -1}
    cards = tuple(Card(name, found.needs() + extra) for name, extra in sizes.items())
    text = str(MethodTable({"as configured": found}, cards))
    [row] = [line for line in text.splitlines() if line.startswith("as configured")]
    assert row.split()[-3:] == ["paged", "fits", "no"]
    assert "never measured" in text
