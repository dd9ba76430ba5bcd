"""LISA on a model that FSDP2 splits over two processes: equal to one process with all of it."""

import warnings
from pathlib import Path

import helpers_memory as small
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers_processes import ranks
from helpers_ranks import batch, build
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.measure.ablation.change import LearnedChange
from lisa_train.measure.probe.result import probed_batches
from lisa_train.measure.processes import Processes
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.layer_map import find_layers
from lisa_train.model.master_copies import exact
from lisa_train.model.norms import local
from lisa_train.model.tensor_table import number_tensors

pytestmark = pytest.mark.processes

WORLD, STEPS = 2, 6
# A run is left in the middle of an interval of two steps, and taken up until there.
LEFT, END = 5, 9
# name -> settings of LISA, bf16 in the forward and backward pass, recomputed activations
CASES = {
    "reset": ({}, False, False),
    "keep": ({"optimizer_state": "keep", "sampling": "cyclic"}, False, True),
    "offload, warm-up": (
        {"optimizer_state": "offload", "warmup_steps": 2, "sampling": "balanced"}, False, False,
    ),
    "groups drawn": (
        {"always_active": ("norm",), "embed_probability": 0.5, "head_probability": 0.5}, False,
        False,
    ),
    # In bf16 a tensor is held by how far it moved; so every layer is drawn once.
    "fp32_active": (
        {"precision": "fp32_active", "optimizer_state": "keep", "sampling": "cyclic"}, False,
        False,
    ),
    "bf16": (
        {"always_active": ("norm", "head"), "embed_probability": 0.5, "sampling": "cyclic"}, True,
        True,
    ),
}  # fmt: skip


def begin(settings):
    """A model, in bf16 where what trains has fp32 copies."""
    copied = settings.get("precision") == "fp32_active"
    return build().to(torch.bfloat16 if copied else torch.float32)


def shard(model, *, half):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def rounded(name):
    """Whether a case computes in bf16, or of weights that are bf16."""
    settings, half, _ = CASES[name]
    return half or "precision" in settings


def train(name, model, shares, loss_of):
    """Return what was drawn, norms before clipping, and the weights.

    In bf16 a norm that is summed in another order would be a factor of all gradients whose last
    bit is another one, and every rounding after it may fall otherwise. Without clipping, and with
    steps that are as long as their gradients, each tensor can be held by itself; those near 1 take
    larger ones, by which bf16 moves at all.
    """
    settings, _, checkpointing = CASES[name]
    if checkpointing and loss_of is not loss_in_bf16:  # which recomputes with the weights as stored
        model.gradient_checkpointing_enable()
    model.train()
    how, larger, longest = {"lr": 1e-2, "eps": 1e-3}, 1e-2, 0.05
    if rounded(name):
        how, larger, longest = {"lr": 0.3, "eps": 1.0, "weight_decay": 0.0}, 30.0, float("inf")
    groups = [[p for p in model.parameters() if (p.dim() == 1) is one] for one in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "lr": larger}], **how
    )
    drawn, norms = [], []
    with Lisa(model, optimizer, lt.LisaConfig(1, 2, **settings), seed=3) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            drawn.append((engine.active_layers, engine.active_groups))
            for rank in shares:
                (loss_of(model, batch(step, 0, rank)) / len(shares)).backward()
            engine.average_gradients()  # FSDP2 has done it
            norm = nn.utils.clip_grad_norm_(model.parameters(), longest)
            norms.append(whole(norm).float())
            optimizer.step()
            optimizer.zero_grad()
            if settings.get("optimizer_state") is None:
                active = {p for p in model.parameters() if p.requires_grad}
                assert {p for p in optimizer.state if optimizer.state[p]} <= active
            if step == 3:  # leaves the root's tensors gathered
                with torch.no_grad():
                    loss_of(model, batch(step, 0, shares[0]))
    weights = {key: whole(value) for key, value in model.state_dict().items()}
    return {"drawn": drawn, "norms": torch.stack(norms), "model": weights}


# Settings of LISA under which a run is left in the middle of an interval and taken up again.
RESUMED = {
    "reset": {},
    "offload": {"optimizer_state": "offload", "warmup_steps": 2, "sampling": "balanced"},
    "learned": {
        "optimizer_state": "keep", "sampling": "balanced",
        "learn": lt.LearnConfig(metric="grad_rms", start_after=2),
    },
    "fp32_active": {"optimizer_state": "keep", "precision": "fp32_active"},
}  # fmt: skip


def run_on(model, optimizer, engine, numbers, shares):
    drawn = []
    for step in numbers:
        engine.begin_step(step)
        drawn.append(engine.active_layers)
        for rank in shares:
            (loss_of(model, batch(step, 0, rank)) / len(shares)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drawn


def begun_with(name, model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    return model, optimizer, Lisa(model, optimizer, lt.LisaConfig(1, 2, **RESUMED[name]), seed=3)


def write_pieces(name, model, optimizer, engine, folder, rank):
    """Save by torch.distributed.checkpoint, and beside it what LISA keeps."""
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": state}, checkpoint_id=folder / name
    )
    own = {"lisa": engine.state_dict(), "tensors": engine.tensors()}  # all processes make it
    if not rank:
        torch.save(own, folder / f"{name}.pt")
    dist.barrier()


def read_pieces(name, model, optimizer, engine, folder):
    weights = {"model": model.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process
        dcp.load(weights, checkpoint_id=folder / name)
    model.load_state_dict(weights["model"])
    lt.load_saved_state(model, optimizer, folder / name)
    own = torch.load(folder / f"{name}.pt", weights_only=True)
    engine.load_state_dict(own["lisa"])
    engine.load_tensors(own["tensors"])


def left_and_taken_up(name, rank, folder):
    """Leave a run in pieces of each process and in those of torch.distributed.checkpoint.

    Return whether it goes on to the bit from either, and how it ended.
    """
    parts = begun_with(name, shard(begin(RESUMED[name]), half=False))
    run_on(*parts, range(LEFT), [rank])
    write_own(*parts, folder / f"{name}-checkpoint-{rank}.pt")
    write_pieces(name, *parts, folder / "pieces", rank)
    drawn = run_on(*parts, range(LEFT, END), [rank])
    parts[2].close()
    found = {
        "drawn": drawn, "shapes": [tuple(p.to_local().shape) for p in parts[0].parameters()],
        "model": {key: whole(value) for key, value in parts[0].state_dict().items()},
    }  # fmt: skip
    for how in ("own", "pieces"):
        again = begun_with(name, shard(begin(RESUMED[name]), half=False))
        if how == "own":
            read_own(*again, folder / f"{name}-checkpoint-{rank}.pt")
        else:
            read_pieces(name, *again, folder / "pieces")
        found[f"{how} held"] = sum(bool(again[1].state.get(p)) for p in again[0].parameters())
        assert run_on(*again, range(LEFT, END), [rank]) == drawn
        again[2].close()
        found[how] = equal(parts, again)
    return found


def write_own(model, optimizer, engine, file):
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "lisa": engine.state_dict(), "tensors": engine.tensors(),
    }  # fmt: skip
    torch.save(state, file)


def read_own(model, optimizer, engine, file):
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    engine.load_state_dict(saved["lisa"])
    engine.load_tensors(saved["tensors"])


def equal(one, other):
    """Whether models and optimizers hold the same pieces, to the bit."""
    states = [each[1].state_dict()["state"] for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    pairs = [(a[key], states[1][i][key]) for i, a in states[0].items() for key in a]
    pairs += zip(one[0].parameters(), other[0].parameters(), strict=True)
    return all(torch.equal(local(a), local(b)) for a, b in pairs)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def loss_in_bf16(model, ids):
    """What FSDP2 computes with bf16 copies of fp32 weights, gradients summed in fp32."""
    copies = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    return torch.func.functional_call(model, copies, kwargs={"input_ids": ids, "labels": ids}).loss


def process(rank, folder):
    folder = Path(folder)
    for name, (settings, half, _) in CASES.items():
        found = train(name, shard(begin(settings), half=half), [rank], loss_of)
        torch.save(found, folder / f"{name}-{rank}.pt")
    (folder / "pieces").mkdir(exist_ok=True)
    for name in RESUMED:
        torch.save(left_and_taken_up(name, rank, folder), folder / f"{name}-left-{rank}.pt")
    for name in MEASURED:
        torch.save(held(name, rank), folder / f"{name}-held-{rank}.pt")
    torch.save(peak(rank), folder / f"peak-{rank}.pt")
    torch.save(refused(), folder / f"refused-{rank}.pt")


MEASURED = {
    "fp32": ({}, torch.float32),
    "fp32_active": ({"precision": "fp32_active"}, torch.bfloat16),
}


def held(name, rank):
    """What one process holds after backward, and of the optimizer after its step."""
    settings, dtype = MEASURED[name]
    model = shard(small.real_model(small.llama(), dtype=dtype), half=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2, **settings), seed=3) as engine:
        for step in range(3):  # of two draws: resting layers have nothing left
            engine.begin_step(step)
            loss_of(model, batch(step, 0, rank)).backward()
            parts = {
                "gradients": [p.grad for p in model.parameters() if p.grad is not None],
                "weights": [*model.parameters(), *model.buffers(),
                            *(exact(p) for p in model.parameters())],
            }  # fmt: skip
            found = {part: small.stored(map(local, tensors)) for part, tensors in parts.items()}
            optimizer.step()
            optimizer.zero_grad()
        layers = engine.active_layers
        states = [s[k] for s in optimizer.state.values() for k in s if k != "step"]
        moved = {n for n, p in model.named_parameters() if optimizer.state.get(p)}
        active = {n for n, p in model.named_parameters() if p.requires_grad}
    found |= {"optimizer": small.stored(map(local, states)), "layers": layers}
    return found | {"rests": moved == active != {n for n, _ in model.named_parameters()}}


# So large that what kernels allocate for themselves is small beside it.
WIDE = {
    "hidden_size": 128, "intermediate_size": 352, "vocab_size": 2000, "num_key_value_heads": 4,
    "num_hidden_layers": 6,
}  # fmt: skip
BATCH, LENGTH = 4, 96


def peak(rank):
    """Most bytes that one process has allocated at once in a step, by the allocator's record."""
    config = small.llama(**WIDE)
    model = shard(small.real_model(config, dtype=torch.float32, attn_implementation="eager"),
                  half=False)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = small.batch_for(model, BATCH, LENGTH)
    with Lisa(model, optimizer, lt.LisaConfig(1, 9), seed=3) as engine:
        for step in range(2):  # the second one begins with the optimizer's state
            engine.begin_step(step)
            states = [s[k] for s in optimizer.state.values() for k in s if k != "step"]
            kept = [*map(local, (*model.parameters(), *states)), *model.buffers()]
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                loss_of_inputs = model(**inputs).loss
                loss_of_inputs.backward()
                del loss_of_inputs
                optimizer.step()
                optimizer.zero_grad()
        layers = engine.active_layers
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return {"peak": top + small.stored(kept), "layers": layers}


def refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import Shard

    copies = fully_shard(
        build(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    )
    parallel, mesh = build(), init_device_mesh("cpu", (2,))
    head = distribute_tensor(parallel.lm_head.weight.data, mesh, [Shard(0)])
    parallel.lm_head.weight = nn.Parameter(head)
    split = shard(build(), half=False)
    table = number_tensors(split, find_layers(split), None)
    said = {}
    for name, model, settings in (
        ("HSDP", copies, {}),
        ("tensor parallel", parallel, {}),
        ("parts of layers", split, {"by": "half"}),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        try:
            Lisa(model, optimizer, lt.LisaConfig(1, 2, **settings))
        except ConfigError as error:
            said[name] = str(error)
    for name, start in {
        "probe": lambda: lt.probe(split, [], "nowhere"),
        "batches": lambda: probed_batches(split, table, Processes(table), []),
        "ablation": lambda: LearnedChange(split, None),
    }.items():
        with pytest.raises(ConfigError) as error:
            start()
        said[name] = str(error.value)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left; launched once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(process, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_whole_model(folder, name):
    first, second = (torch.load(folder / f"{name}-{rank}.pt") for rank in range(WORLD))
    alone = in_one(name)
    assert first["drawn"] == second["drawn"] == alone["drawn"]
    copied = CASES[name][0].get("precision") == "fp32_active"  # torch rounds their norm to bf16
    tolerance = torch.finfo(torch.bfloat16).eps if copied else 2e-5
    torch.testing.assert_close(first["norms"], alone["norms"], rtol=tolerance, atol=0)
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key
    begun = begin(CASES[name][0]).state_dict()
    near(first["model"], alone["model"], begun, half=rounded(name))
    if rounded(name):
        assert not [key for key, value in alone["model"].items() if torch.equal(value, begun[key])]


def in_one(name, factor=1.0, of=""):
    """The same training in one process; with `factor`, of which a tensor's gradient is taken."""
    settings, half, _ = CASES[name]
    model = begin(settings)
    if of:
        model.get_parameter(of).register_hook(lambda gradient: factor * gradient)
    return train(name, model, range(WORLD), loss_in_bf16 if half else loss_of)


def near(found, wanted, begun, *, half):
    """Hold every tensor of weights against another's.

    In bf16 by how far it moved: what is rounded to the same bits differs nowhere on most machines,
    and where a last bit of fp32 turns one rounding, by less than this.
    """
    for key, value in wanted.items():
        if half:
            distance, moved = ((x.float() - value.float()).norm() for x in (found[key], begun[key]))
            assert distance <= 1e-2 * moved, key
        else:
            torch.testing.assert_close(found[key], value, rtol=2e-5, atol=2e-6)


LEAST = "model.layers.0.self_attn.q_proj.weight"  # moves least of all


@pytest.mark.parametrize("name", ["bf16", "fp32_active"])
@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize("which", ["least", pytest.param("all", marks=pytest.mark.slow)])
def test_a_gradient_of_one_tensor_that_is_lost_or_doubled_is_seen(folder, name, factor, which):
    found, begun = torch.load(folder / f"{name}-0.pt")["model"], begin(CASES[name][0]).state_dict()
    for of in [LEAST] if which == "least" else begun:
        with pytest.raises(AssertionError, match=of):
            near(found, {of: in_one(name, factor, of)["model"][of]}, begun, half=True)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_whose_pieces_were_saved_goes_on_to_the_bit(folder, name):
    first, second = (torch.load(folder / f"{name}-left-{rank}.pt") for rank in range(WORLD))
    assert first["own"]
    assert second["own"]
    assert first["drawn"] == second["drawn"]
    assert len(set(first["drawn"])) > 1
    sizes = [p.numel() for p in build().parameters()]
    assert all(torch.tensor(a).prod() < n for a, n in zip(first["shapes"], sizes, strict=True))


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_in_pieces_is_taken_up_to_the_bit(folder, name):
    found = [torch.load(folder / f"{name}-left-{rank}.pt") for rank in range(WORLD)]
    assert all(each["pieces"] is True for each in found)
    assert found[0]["drawn"] == found[1]["drawn"]
    if RESUMED[name].get("optimizer_state") is None:  # resting layers have none, loaded or not
        model = build()
        active = [*model.model.layers[0].parameters(), *model.lm_head.parameters()]
        active += [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
        assert found[0]["pieces held"] == found[0]["own held"] == len(active)


@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_takes_up_a_checkpoint_in_pieces(folder, name):
    found = torch.load(folder / f"{name}-left-0.pt")
    model, optimizer, engine = begun_with(name, begin(RESUMED[name]))
    read_pieces(name, model, optimizer, engine, folder / "pieces")
    assert run_on(model, optimizer, engine, range(LEFT, END), range(WORLD)) == found["drawn"]
    engine.close()
    begun, half = begin(RESUMED[name]).state_dict(), model.dtype == torch.bfloat16
    # In bf16 gradients are rounded before they are averaged, or after.
    near(found["model"], model.state_dict(), begun, half=half)


@pytest.mark.parametrize("name", MEASURED)
def test_a_process_holds_what_the_estimate_says(folder, name):
    settings, dtype = MEASURED[name]
    for rank in range(WORLD):
        held = torch.load(folder / f"{name}-held-{rank}.pt")
        found = lt.estimate_memory(
            small.llama(), "lisa", dtype=str(dtype).removeprefix("torch."), devices=WORLD,
            sequence_length=8, optim="adamw_torch", lisa=lt.LisaConfig(1, 2, **settings),
            active_layers=held["layers"],
        )  # fmt: skip
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(found.fullest, part) == held[part], part
        assert held["rests"]


def test_the_peak_of_a_process_is_what_the_estimate_says(folder):
    """An upper estimate: that all that is gathered meets the peak of the activations."""
    for rank in range(WORLD):
        found = torch.load(folder / f"peak-{rank}.pt")
        estimate = lt.estimate_memory(
            small.llama(**WIDE), "lisa", dtype="float32", devices=WORLD, batch_size=BATCH,
            sequence_length=LENGTH, optim="adamw_torch", lisa=lt.LisaConfig(1, 9),
            active_layers=found["layers"], attn_implementation="eager",
        )  # fmt: skip
        print(f"\npeak of process {rank}: {found['peak']}, estimated {estimate.total}")
        assert 0.8 * estimate.total <= found["peak"] <= estimate.total


def of_four(rank, folder):
    for name in FOUR:
        found = train(name, shard(begin(CASES[name][0]), half=False), [rank], loss_of)
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")


FOUR = ("keep", "groups drawn")


@pytest.mark.slow
def test_four_processes_equal_one_with_the_whole_model(tmp_path):
    ranks(of_four, tmp_path, world=4)
    for name in FOUR:
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(4)]
        alone = train(name, build(), range(4), loss_of)
        assert all(each["drawn"] == alone["drawn"] for each in found)
        torch.testing.assert_close(found[0]["norms"], alone["norms"], rtol=2e-5, atol=0)
        for key, value in alone["model"].items():
            assert all(torch.equal(found[0]["model"][key], each["model"][key]) for each in found)
            torch.testing.assert_close(found[0]["model"][key], value, rtol=2e-5, atol=2e-6)


def test_one_process_takes_up_the_copies_of_two(folder):
    saved = torch.load(folder / "fp32_active-checkpoint-0.pt", weights_only=True)
    model = begin(RESUMED["fp32_active"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Lisa(model, optimizer, lt.LisaConfig(1, 2, **RESUMED["fp32_active"]), seed=3) as engine:
        engine.load_state_dict(saved["lisa"])
        engine.load_tensors(saved["tensors"])
        weights = saved["tensors"]["weights"]
        assert sum(weight is not None for weight in weights) > 5
        for p, weight in zip(model.parameters(), weights, strict=True):
            assert weight is None or torch.equal(exact(p), weight)
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HSDP", "FSDP2 with copies (HSDP)"),
        ("tensor parallel", "weights that tensor parallelism splits"),
        ("parts of layers", "where parts of a layer are not known to train right"),
        ("probe", "weights are sharded (FSDP2): a probe takes whole gradients"),
        ("batches", "several batches cannot be probed at once with sharded weights"),
        ("ablation", "weights are sharded (FSDP2): an ablation takes whole ones"),
    ],
)
def test_what_is_not_proved_is_refused(folder, name, words):
    for rank in range(WORLD):
        assert words in torch.load(folder / f"refused-{rank}.pt")[name]
