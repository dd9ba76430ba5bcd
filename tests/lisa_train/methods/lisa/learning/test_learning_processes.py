"""Two processes learn the same numbers at the same optimizer step, and draw alike."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_processes import ranks as launched
from torch.nn.parallel import DistributedDataParallel

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.engine import Lisa
from lisa_train.model.parallel import in_all

pytestmark = pytest.mark.processes

WORLD, STEPS, LAYERS = 2, 16, 4
# In the middle of an interval; and as many steps as one process is compared with.
STOP, COMPARED = 13, 11


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def batch(step, rank, micro):
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    return torch.randint(3, 64, (2, 8), generator=generator)


def config(metric):
    name = "signal" if metric == "halves" else metric  # of the halves of a batch
    passes = {"probe_every": 1} if metric == "probe" else {}
    learn = lt.LearnConfig(metric=name, start_after=0, **passes)
    return lt.LisaConfig(2, 2, "balanced", learn=learn, control="permuted")


def train(model, wrapped, ranks, metric, *, stop=STEPS, saved=None, state=None):
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2, momentum=0.9)
    if state is not None:
        optimizer.load_state_dict(state)
    draws, learned, at, kept = [], [], [0], None

    def one(micro):
        """What this process adds to the mean over all; alone it takes the batches of both."""
        for rank in ranks:
            ids = batch(at[0], rank, micro)
            loss = wrapped(input_ids=ids, labels=ids).loss / 2 / len(ranks)
            loss.backward()

    def probe(micro=0):
        """One backward pass of the mean over the batches."""
        every = [batch(at[0], rank, micro) for rank in ranks]
        losses = [model(input_ids=ids, labels=ids).loss for ids in every]
        (sum(losses) / len(losses)).backward()

    settings = config(metric)
    given = {"halves": (probe, partial(probe, 1)), "probe": probe}.get(metric)
    with Lisa(wrapped, optimizer, settings, seed=3, on_draw=draws.append, probe=given) as engine:
        if saved is not None:
            engine.load_state_dict(saved)
        learn = engine._schedule.learn
        engine._schedule.learn = lambda step, values: (
            learned.append([step, list(values)]), learn(step, values))[1]  # fmt: skip
        for step in range(0 if saved is None else saved["step"] + 1, stop):
            at[0] = step
            engine.begin_step(step)
            if hasattr(wrapped, "no_sync"):
                with wrapped.no_sync():
                    one(0)
            else:
                one(0)
            one(1)
            optimizer.step()
            optimizer.zero_grad()
            if step == STOP - 1:
                kept = {
                    "engine": engine.state_dict(), "draws": list(draws),
                    "weights": copy.deepcopy(model.state_dict()),
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                }  # fmt: skip
        # Saved after the step, as a checkpoint is.
        end = engine.state_dict()
    if kept is not None:
        kept["draws"] = facts(kept["draws"])
    return {
        "draws": facts(draws),
        "kept": kept,
        "learned": learned,
        "state": end,
        "optimizer": optimizer.state_dict(),
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
    }


def facts(draws):
    return [[d.step, d.layers, d.inclusion_probabilities, d.scores] for d in draws]


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def process(rank, folder):
    found = {}
    for metric in ("grad_rms", "signal", "probe"):
        model = build()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        found[metric] = train(model, wrapped, [rank], metric)
        # Every process goes on from what the first one saved.
        half = found[metric].pop("kept")
        model = build()
        model.load_state_dict(half["weights"])
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        states = [half["engine"]]
        dist.broadcast_object_list(states, src=0)
        saved = json.loads(json.dumps(states[0]))
        again = train(model, wrapped, [rank], metric, saved=saved, state=half["optimizer"])
        again["draws"] = half["draws"] + again["draws"]
        found[metric]["again"] = again
    found |= sharded(rank)
    assert in_all(True)
    assert not in_all(rank == 0)
    torch.save(found, Path(folder) / f"{rank}.pt")


SHARDED = ("grad_rms", "descent", "probe", "halves")


def sharded(rank):
    found = {}
    for metric in SHARDED:
        model = shard(build())
        done = train(model, model, [rank], metric, stop=COMPARED)
        found[f"sharded {metric}"] = {n: done[n] for n in ("draws", "learned", "state")}
    model = shard(build())
    with pytest.raises(ConfigError, match="'signal' from micro-batches with weights that FSDP2"):
        train(model, model, [rank], "signal", stop=1)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    launched(process, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("metric", ["grad_rms", "signal", "probe"])
def test_all_processes_learn_the_same(ranks, metric):
    one, other = (each[metric] for each in ranks)
    assert json.dumps(one["learned"]) == json.dumps(other["learned"])
    assert one["draws"] == other["draws"]
    assert one["state"] == other["state"]
    assert [step for step, _ in one["learned"]] == list(range(2, STEPS, 2))
    assert len({tuple(pi) for _, _, pi, _ in one["draws"]}) > 1
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name])


@pytest.mark.parametrize("metric", ["grad_rms", "signal", "probe"])
def test_resumed_inside_a_period_they_go_on_to_the_bit(ranks, metric):
    for each in ranks:
        whole, again = each[metric], each[metric]["again"]
        assert again["draws"] == whole["draws"]
        assert again["state"] == whole["state"]
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, again["weights"][name])


@pytest.mark.parametrize("metric", SHARDED)
def test_what_they_learn_is_what_one_process_learns_of_both_batches(ranks, metric):
    """With a copy of the model in each, and with one that FSDP2 splits between them.

    With copies, a pass of each process is one of its own, and squares are averaged, not gradients.
    """
    model = build()
    alone = train(model, model, [0, 1], metric, stop=COMPARED)
    for name in (f"sharded {metric}", *([metric] if metric == "grad_rms" else ())):
        assert json.dumps(ranks[0][name]["learned"]) == json.dumps(ranks[1][name]["learned"])
        assert ranks[0][name]["draws"] == ranks[1][name]["draws"]
        for (step, values), (mine, both) in zip(
            alone["learned"][:5], ranks[0][name]["learned"][:5], strict=True
        ):
            assert step == mine
            if metric in ("probe", "halves"):  # of which each may be a small difference
                bound = {"rtol": 2e-5, "atol": 2e-5 * np.nanmax(values)}
            else:
                bound = {"rtol": 1e-4}
            np.testing.assert_allclose(both, values, err_msg=name, **bound)
        drawn = [draw[:2] for draw in alone["draws"]]
        assert [draw[:2] for draw in ranks[0][name]["draws"]][: len(drawn)] == drawn
