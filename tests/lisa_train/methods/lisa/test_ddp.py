"""Two processes: all draw the same layers, replicas stay equal, the rest is refused."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_processes import ranks
from helpers_ranks import WAYS, several_equal_one
from torch.nn.parallel import DistributedDataParallel

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.engine import Lisa

pytestmark = pytest.mark.processes

STEPS, WORLD = 9, 2
CONFIG = lt.LisaConfig(1, 3)


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(3, 64, (2, 8), generator=generator)


def process(rank, folder):
    work(rank, folder, "fp32", CONFIG, torch.float32)
    masters = lt.LisaConfig(1, 3, precision="fp32_active")
    work(rank, folder, "bf16", masters, torch.bfloat16)
    start(rank, folder)


def work(rank, folder, name, config, dtype):
    torch.manual_seed(rank)  # the ranks' own streams differ; the draws do not
    np.random.seed(rank)  # noqa: NPY002
    model = build().to(dtype)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    drawn = []
    with Lisa(wrapped, optimizer, config, seed=3) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            drawn.append(engine.active_layers)
            ids = batch(step, rank)
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"drawn": drawn, "model": model.state_dict()}, Path(folder) / f"{name}-{rank}.pt")


def start(rank, folder):
    """Starts that end in a refusal, a word or two schedules; what each said is written down."""
    said = {}

    def attempt(name, config, *, seed=3, model=None, make=None, **ddp):
        logged, notices = [], []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())
        logging.getLogger("lisa_train").addHandler(handler)
        model = model or build()
        wrapped = DistributedDataParallel(model, **{"find_unused_parameters": True, **ddp})
        optimizer = (make or torch.optim.SGD)(wrapped.parameters(), lr=1e-2)
        drawn = []
        try:
            with Lisa(
                wrapped, optimizer, config, seed=seed, total_steps=3, on_notice=notices.append
            ) as engine:
                for step in range(6):
                    engine.begin_step(3 * step)
                    drawn.append(engine.active_layers)
        except ConfigError as error:
            said[name] = {"refused": str(error)}
        else:
            said[name] = {"drawn": drawn, "seed": engine.config.seed}
        said[name] |= {"logged": logged, "notices": notices}
        logging.getLogger("lisa_train").removeHandler(handler)

    attempt("own seeds", CONFIG, seed=3 + rank)
    attempt("given seeds", lt.LisaConfig(1, 3, seed=5 + rank))
    attempt("settings", lt.LisaConfig(1, 3 + rank))
    attempt("one alone", CONFIG, make=torch.optim.ASGD if rank else torch.optim.SGD)
    attempt("unused", CONFIG, find_unused_parameters=False)
    attempt("static", CONFIG, static_graph=True)
    attempt("all train", lt.LisaConfig(4, 3), find_unused_parameters=False)
    try:
        lt.StepInBackward(torch.optim.SGD(build().parameters(), lr=1e-2))
    except ConfigError as error:
        said["step"] = {"refused": str(error)}
    said |= sharded()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))


def sharded():
    """LISA and the recorder under FSDP version 1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = {}
    for name, wrap in (
        ("fsdp1 flat", lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"))),
        ("fsdp1", lambda m: FullyShardedDataParallel(
            m, use_orig_params=True, device_id=torch.device("cpu"))),
    ):  # fmt: skip
        model = wrap(build())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for who, make in (
            ("lisa", lambda: Lisa(model, optimizer, CONFIG)),  # noqa: B023
            ("record", lambda: lt.NormRecorder(model, optimizer, lt.RecordConfig("r"))),  # noqa: B023
        ):
            try:
                make()
            except ConfigError as error:
                said[f"{name} {who}"] = {"refused": str(error)}
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left; launched once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(process, folder)
    return folder


@pytest.fixture(scope="module")
def starts(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(("name", "seeds"), [("own seeds", "3, 4"), ("given seeds", "5, 6")])
def test_ranks_with_seeds_of_their_own_draw_by_that_of_the_first(starts, name, seeds):
    first, second = (said[name] for said in starts)
    assert first["drawn"] == second["drawn"]
    assert len({tuple(layers) for layers in first["drawn"]}) > 1
    seed = int(seeds[0])
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Lisa(model, optimizer, CONFIG, seed=seed) as engine:
        for step, layers in enumerate(first["drawn"]):
            engine.begin_step(3 * step)
            assert list(engine.active_layers) == layers
    words = f"different seeds ({seeds}): all draw their layers by that of process 0 ({seed})"
    assert any(words in text for text in first["logged"])
    assert any(words in text for text in second["notices"])


def test_one_process_speaks_for_all(starts):
    first, second = (said["own seeds"] for said in starts)
    assert any("will never train" in text for text in first["logged"])
    assert second["logged"] == []
    assert first["notices"] == second["notices"]


def test_ranks_with_different_settings_are_refused_on_every_rank(starts):
    for said in starts:
        assert "interval_steps = 3 in process 0, but 4 in process 1" in said["settings"]["refused"]


def test_a_rank_that_cannot_start_stops_the_others_with_its_sentence(starts):
    first, second = (said["one alone"]["refused"] for said in starts)
    assert second.startswith("ASGD holds the averaged weights")
    assert first == f"process 1 cannot start LISA: {second}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unused", "find_unused_parameters is off in DistributedDataParallel"),
        ("static", "static_graph is on in DistributedDataParallel"),
        ("step", "stepping inside backward with 2 processes would use gradients before"),
        ("fsdp1 flat lisa", "LISA does not work under FSDP version 1"),
        ("fsdp1 flat record", "the recorder does not work under FSDP version 1"),
        ("fsdp1 lisa", "LISA does not work under FSDP version 1"),
        ("fsdp1 record", "the recorder does not work under FSDP version 1"),
    ],
)
def test_what_is_not_proved_in_several_processes_is_refused(starts, name, words):
    for said in starts:
        assert words in said[name]["refused"]


def test_nothing_rests_nothing_to_wait_for(starts):
    for said in starts:
        assert said["all train"]["drawn"] == [[0, 1, 2, 3]] * 6


def test_data_parallel_is_refused():
    model = torch.nn.DataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(
        ConfigError, match=r"LISA does not work under torch\.nn\.DataParallel.*torchr"
    ):
        Lisa(model, optimizer, CONFIG)
    with pytest.raises(ConfigError, match=r"the recorder does not work under torch\.nn\.DataPar"):
        lt.NormRecorder(model, optimizer, lt.RecordConfig("r"))


class DeepSpeedEngine(torch.nn.Module):
    """DeepSpeed's wrapper as far as anybody asks it."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_is_refused_in_a_loop(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    if stage == 3:
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id = number
    words = "gradients and weights in buffers" if stage == 3 else "gradients in buffers"
    trained = model if stage == 3 else DeepSpeedEngine(model)
    words = rf"does not work under DeepSpeed, which keeps {words}.*torchrun --nproc-per-node N"
    with pytest.raises(ConfigError, match=f"LISA {words}"):
        Lisa(trained, optimizer, CONFIG)
    with pytest.raises(ConfigError, match=f"the recorder {words}"):
        lt.NormRecorder(trained, optimizer, lt.RecordConfig("r"))


def test_an_optimizer_of_zero_is_refused_beside_a_plain_model(tmp_path):
    """What `deepspeed.initialize` returns holds an optimizer whose tensors are not the model's."""
    kind = type(
        "DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"}
    )
    model, optimizer = build(), kind()
    optimizer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(9))], lr=1e-2)
    words = "DeepSpeedZeroOptimizer of DeepSpeed steps flat pieces of the tensors"
    with pytest.raises(ConfigError, match=words):
        Lisa(model, optimizer, CONFIG)
    with pytest.raises(ConfigError, match=words):
        lt.NormRecorder(model, optimizer, lt.RecordConfig(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_what_the_gpu_tests_do_holds_on_a_cpu(tmp_path, name):
    several_equal_one(tmp_path, name, device="cpu", backend="gloo")


def test_replicas_with_fp32_copies_stay_equal_to_the_bit(folder):
    """Where the dtype of what trains was swapped, DDP lost its hooks and the replicas parted."""
    first, second = (torch.load(folder / f"bf16-{rank}.pt") for rank in range(WORLD))
    begun = build().bfloat16().state_dict()
    for name, value in first["model"].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, second["model"][name]), name
    assert any(not torch.equal(value, begun[name]) for name, value in first["model"].items())


def test_ranks_agree_and_equal_one_process_with_both_batches(folder):
    first, second = (torch.load(folder / f"fp32-{rank}.pt") for rank in range(WORLD))
    assert first["drawn"] == second["drawn"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name

    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Lisa(model, optimizer, CONFIG, seed=3) as engine:
        for step in range(STEPS):
            engine.begin_step(step)
            assert engine.active_layers == first["drawn"][step]
            for rank in range(WORLD):
                ids = batch(step, rank)
                (model(input_ids=ids, labels=ids).loss / WORLD).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-4, atol=1e-4)
