"""Many runs in one process of two (DDP and FSDP2), and the same runs in one process alone.

`main` is one process of two, launched once for all tests: importing torch takes longer than
everything else. A process alone calls the same functions with world 1.
"""

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_recording import arguments, examples, llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lisa_train as lt
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_train.measure.disk.writer import RunWriter, SilentWriter
from lisa_train.measure.probe import averaged_gradients as averaging
from lisa_train.measure.probe import measuring_pass
from lisa_train.model.layer_map import find_layers
from lisa_train.model.norms import local
from lisa_train.model.tensor_table import TensorTable

STEPS, MICRO, EVERY, CLIP = 4, 2, 2, 0.5


def main(rank, folder, names):
    for name in names:
        SCENARIOS[name](Path(folder) / name, rank, dist.get_world_size())


# ---------------------------------------------------------------------- models and batches


def small():
    # Rows that two processes share unevenly.
    return llama(hidden_size=24, intermediate_size=33)


def with_adapters(model):
    """Adapters on every kind of weight, with a rank and rows that two processes share unevenly."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj", "up_proj", "embed_tokens", "lm_head"]
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in find_layers(model).names:
        fully_shard(next(m for n, m in model.named_modules() if n.endswith(layer)), **options)
    return fully_shard(model, **options)


def batches(step):
    """Rows of the micro-batches of a step; labels everywhere, so that means of means are means."""
    rows = examples(64)[8 * step : 8 * step + 8]
    ids = torch.stack([row["input_ids"] for row in rows])
    return ids[:4], ids[4:]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.common = nn.Linear(6, 5)
        self.back = nn.Linear(5, 6)

    def forward(self, x, expert):
        return x + self.experts[expert](x).tanh() + self.back(self.common(x).tanh())


class Routed(nn.Module):
    """Layers of which a batch reaches one expert, in the order of the list or against it."""

    def __init__(self, head_first=False):
        super().__init__()
        torch.manual_seed(5)
        parts = {
            "embed": nn.Embedding(8, 6),
            "layers": nn.ModuleList(Layer() for _ in range(3)),
            "head": nn.Linear(6, 4),
        }
        for name in reversed(parts) if head_first else parts:
            self.add_module(name, parts[name])

    def forward(self, batch, expert, forwards=True):
        generator = torch.Generator().manual_seed(batch)
        x = self.embed(torch.randint(0, 8, (3, 5), generator=generator))
        for layer in self.layers if forwards else reversed(self.layers):
            x = layer(x, expert)
        return self.head(x).square().mean()


# ---------------------------------------------------------------------- a plain loop


def recorder(folder, model, optimizer, **config):
    """A recorder as a loop makes it, the same on every process."""
    return lt.NormRecorder(
        model, optimizer, lt.RecordConfig(str(folder), **{"every": EVERY, **config})
    )


def loop(
    folder, model, trained, rank, world, *, steps=STEPS, through=None, keep=None, collectives=1,
    **config,
):  # fmt: skip
    """Accumulate, clip and record; count the recorder's collectives in every recorded step.

    `through` is what measuring passes go through; `keep` takes the weights before each step.
    """
    through = through or trained
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2, eps=1e-4)
    with (
        counted_collectives() as calls,
        recorder(folder, model, optimizer, **config) as record,
    ):
        for step in range(1, steps + 1):
            if keep is not None:
                keep[step] = copied(model)
            total = 0.0
            for number, rows in enumerate(batches(step)):
                ids, last = rows[rank::world], number == MICRO - 1
                with contextlib.nullcontext() if last else no_sync(trained):
                    loss = trained(input_ids=ids, labels=ids).loss / MICRO
                    loss.backward()
                total += loss.detach()
                if not last:
                    record.micro_batch(step)
            before = calls["n"]
            record.before_step(step)
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            optimizer.step()
            record.after_step(
                step, loss=total, grad_norm=norm, clip_coef=(CLIP / (norm + 1e-6)).clamp(max=1.0),
                tokens=torch.tensor(ids.numel() * MICRO * step),
            )  # fmt: skip
            due = step == 1 or step % EVERY == 0
            assert calls["n"] - before == (collectives if due and world > 1 else 0), calls
            optimizer.zero_grad()
            if config.get("probe_every") and step % config["probe_every"] == 0:
                ids = batches(step + 1)[0][rank::world]
                flags = [p.requires_grad for p in model.parameters()]
                record.probe(step, lambda: through(input_ids=ids, labels=ids).loss.backward())  # noqa: B023
                assert flags == [p.requires_grad for p in model.parameters()]
                assert all(p.grad is None for p in model.parameters())
    if keep is not None:
        keep[steps + 1] = copied(model)


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@contextlib.contextmanager
def no_sync(trained):
    """Leave the gradients of a micro-batch where they are."""
    if isinstance(trained, DistributedDataParallel):
        with trained.no_sync():
            yield
        return
    sharded = hasattr(trained, "set_requires_gradient_sync")
    if sharded:
        trained.set_requires_gradient_sync(False)
    yield
    if sharded:
        trained.set_requires_gradient_sync(True)


@contextlib.contextmanager
def counted_collectives():
    """Count the all-reduces that the recorder itself asks for."""
    calls = {"n": 0}
    original = dist.all_reduce

    def all_reduce(*args, **kwargs):
        calls["n"] += 1
        return original(*args, **kwargs)

    with patched(dist, "all_reduce", all_reduce):
        yield calls


@contextlib.contextmanager
def patched(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, original)


def plain(folder, rank, world, wrap=lambda model: model, **kwargs):
    """Full training of a checkpoint with a frozen layer: everything that can be recorded."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder.parent / "base")
    model.model.layers[1].requires_grad_(False)
    config = {"probe_every": 2, "base_delta": True, **kwargs}
    loop(folder, model, wrap(model), rank, world, **config)


def ddp(folder, rank, world):
    # Measuring passes go through DDP's wrapper here, and past it in Trainer.
    plain(folder, rank, world, DistributedDataParallel, grad_noise=True)


def fsdp2(folder, rank, world):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain(folder, rank, world, shard, grad_noise=True)
    said = [str(w.message) for w in caught if "grad_noise is not measured" in str(w.message)]
    assert len(said) == 1, said


def twice(folder, rank, world):
    """A micro-batch of one process makes a second backward pass, which reaches one tensor."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with (
        warnings.catch_warnings(),
        recorder(folder, model, optimizer, grad_noise=True) as record,
    ):
        warnings.simplefilter("ignore")
        for i, ids in enumerate(batches(1)[:2]):
            (model(input_ids=ids, labels=ids).loss / 2).backward()
            if i == 0:
                if rank == world - 1:
                    model.lm_head.weight.square().mean().backward()
                record.micro_batch(1)
        record.before_step(1)
        optimizer.step()
        record.after_step(1)


def adapters(folder, rank, world, wrap=lambda model: model, **kwargs):
    model = with_adapters(small())
    loop(folder, model, wrap(model), rank, world, probe_every=2, **kwargs)
    return model


def adapters_fsdp2(folder, rank, world):
    adapters(folder, rank, world, shard, collectives=2)


def adapters_replicas(folder, rank, world):
    """With replicas (HSDP) a tensor is sharded and copied at once; half as many steps tell."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))
    wrap = lambda model: shard(model, mesh=mesh)  # noqa: E731
    adapters(folder, rank, world, wrap, collectives=2, steps=STEPS // 2)


def adapters_beside(folder, rank, world):
    """Adapters that were added to a sharded model are whole on every process."""
    model = with_adapters(shard(small()))
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    ids = batches(0)[0][rank::world]
    with recorder(folder, model, optimizer) as record:
        record.probe(1, lambda: model(input_ids=ids, labels=ids).loss.backward())


def adapters_resumed(folder, rank, world):
    """Whole and sharded adapters of a run that is begun, left and taken up by other processes."""
    for name, wrap in (("whole", lambda model: model), ("sharded", shard)):
        model = wrap(with_adapters(small()))
        recorder(folder / name, model, torch.optim.SGD(model.parameters())).close()
        model = wrap(moved(with_adapters(small())))
        table = TensorTable(model, find_layers(model), None)
        writer = SilentWriter(1)
        if not rank:
            writer = RunWriter(
                folder / name, manifest={}, parameters=table.rows, resume=True, step=1
            )
        config = lt.RecordConfig(str(folder / name))
        optimizer = torch.optim.SGD(model.parameters())
        again = lt.NormRecorder(model, optimizer, config, writer, table=table, step=1)
        again.census(2)
        again.close()


@torch.no_grad()
def moved(model):
    """Adapters somewhere else than where they began."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.mul_(1.5 + 0.1 * i)
    return model


# ---------------------------------------------------------------------- measuring passes


def probe(folder, rank, wrap, *passes, **order):
    """Measure one pass of each process; some processes' passes reach what others do not."""
    model = Routed(**order)
    model.layers[1].requires_grad_(False)
    through = wrap(model)
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    with recorder(folder, model, optimizer) as record:
        record.probe(1, lambda: through(*passes[rank]).backward())
    return model, through


ROUTES = [(1, 0), (2, 1)]
REVERSED = [(1, 0, False), (2, 1, False)]
MIXED = [(1, 0, True), (2, 0, False)]


def routed_ddp(folder, rank, world):
    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    model, through = probe(folder, rank, wrap, *ROUTES)
    # DDP counts what a backward pass reaches, and gives gradients to all that was: not to experts
    # that a measuring pass alone has reached.
    through(3, 2).backward()
    trained = [expert.weight.grad is not None for expert in model.layers[0].experts]
    assert trained == [False, False, True], trained


def routed_fsdp2(folder, rank, world):
    probe(folder, rank, shard, *ROUTES)


def reversed_order(folder, rank, world):
    probe(folder, rank, lambda model: model, *REVERSED, head_first=True)


def mixed_order(folder, rank, world):
    probe(folder, rank, lambda model: model, *MIXED)


def resting(folder, rank, world):
    """What FSDP has settled for frozen tensors, or has left gathered after an evaluation."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = small()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=half)
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    ids = batches(0)[0][rank::world]
    with torch.no_grad():
        model(input_ids=ids)
    assert not hasattr(model.lm_head.weight, "to_local")
    with recorder(folder, model, optimizer) as record:
        with torch.no_grad():
            model(input_ids=ids)
        record.probe(1, lambda: model(input_ids=ids, labels=ids).loss.backward())
    model(input_ids=ids, labels=ids).loss.backward()
    assert [p.grad is not None for p in model.model.layers.parameters()] == (
        [False] * 9 + [True] * 9 + [False] * 9
    )
    assert model.lm_head.weight.grad is None


def failing_fsdp2(folder, rank, world):
    """What FSDP began cannot be taken back: the error stops training."""
    model = shard(Routed())

    def backward():
        model(1, 0)
        raise ValueError("no loss")

    try:
        with recorder(folder, model, torch.optim.SGD(model.parameters())) as record:
            record.probe(1, backward)
    except ValueError as error:
        assert str(error) == "no loss"  # noqa: PT017
        return
    raise AssertionError("nothing was raised")


def failing(folder, rank, world):
    """The pass of one process fails, before it, within it and after it; the others go on."""
    for number, where in enumerate(("before", "within", "after")):
        model = Routed()
        optimizer = torch.optim.SGD(model.parameters())

        def backward(where=where, model=model):
            if rank and where == "before":
                raise MemoryError("no room")
            loss = model(1, 0)
            if rank and where == "within":
                model.layers[0].back.weight.register_hook(lambda g: 1 / 0)
            loss.backward()
            if rank and where == "after":
                raise ValueError("no loss")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = folder.with_name(f"{folder.name}-{number}")
            with recorder(path, model, optimizer) as record:
                record.probe(1, backward)
                record.probe(1, backward)
        said = [str(w.message) for w in caught if "nothing is probed any more" in str(w.message)]
        assert len(said) == 1, said
        assert rank or "failed on another process" in said[0], said
        assert all(p.grad is None for p in model.parameters())


def memory(folder, rank, world):
    """At no time are there more gradients than those of a layer, frozen ones included."""
    for wrap, module in (
        (DistributedDataParallel, averaging),
        (shard, measuring_pass),
    ):
        model = small()
        model.model.layers[0].requires_grad_(False)
        through = wrap(model)
        layer = sum(local(p).numel() for p in model.model.layers[0].parameters())
        held = []

        def squares(tensors, model=model, original=module.squares, held=held):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            held.append(sum(local(g).numel() for g in gradients))
            return original(tensors)

        optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
        ids = batches(0)[0][rank::world]
        path = folder.with_name(f"memory-{wrap.__name__}")
        with recorder(path, model, optimizer) as record, patched(module, "squares", squares):
            record.probe(1, lambda: through(input_ids=ids, labels=ids).loss.backward())  # noqa: B023
        assert len(held) >= 30
        assert 0 < max(held) <= layer, (max(held), layer)


# ---------------------------------------------------------------------- Trainer


def trainer(
    folder, rank, world, model=None, *, lisa=None, record=None, checkpoint=None, incomplete=False,
    **changes,
):  # fmt: skip
    """The same global batches for any number of processes."""
    from transformers import Trainer

    settings = {
        "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5, "max_steps": 4, "adam_epsilon": 1e-4, **changes,
    }  # fmt: skip

    class Keeping(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.batches.append(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    model = model or llama()
    trainer = Keeping(model, arguments(folder / "out", **settings), train_dataset=examples(64))
    trainer.batches = []
    config = lt.RecordConfig(str(folder), **{"every": EVERY, "probe_every": 2, **(record or {})})
    lt.attach(trainer, lisa=lisa, record=config, resume_incomplete=incomplete)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(p.grad is None for p in trainer.model.parameters())
    return trainer


def trainer_ddp(folder, rank, world):
    record = {"grad_noise": True}
    trainer(folder, rank, world, record=record, ddp_find_unused_parameters=False)


LISA = lt.LisaConfig(activated_layers=1, interval_steps=2, sampling="cyclic")


SAVING = {"save_strategy": "steps", "save_steps": 2}


def trainer_lisa(folder, rank, world):
    done = trainer(folder, rank, world, lisa=LISA, **SAVING, ddp_find_unused_parameters=True)
    if not rank:
        torch.save(done.model.state_dict(), folder / "model.pt")


def trainer_saved(folder, rank, world):
    trainer(folder, rank, world, **SAVING, ddp_find_unused_parameters=False)


def trainer_joined(folder, rank, world):
    """Go on with what one process began."""
    checkpoint = folder / "out" / "checkpoint-2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the number of processes is another
        trainer(folder, rank, world, lisa=LISA, checkpoint=str(checkpoint), **SAVING)


def trainer_fsdp2(folder, rank, world, **changes):
    """Sharded by transformers as it loads: accelerate has no FSDP for CPUs."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=world)
    base = folder.parent / "base"
    model = LlamaForCausalLM.from_pretrained(base, distributed_config=config)
    assert hasattr(model.lm_head.weight, "to_local")
    return trainer(folder, rank, world, model, **changes)


def trainer_lisa_fsdp2(folder, rank, world):
    done = trainer_fsdp2(folder, rank, world, lisa=LISA)
    weights = {name: p.full_tensor() for name, p in done.model.state_dict().items()}
    if not rank:
        torch.save(weights, folder / "model.pt")


def trainer_fsdp2_saved(folder, rank, world):
    """Checkpoints of sharded models hold weights alone, and cannot be resumed from."""
    saving = {**SAVING, "save_only_model": True, "max_steps": 2}
    again, checkpoint = folder.with_name("trainer-fsdp2-again"), str(folder / "out/checkpoint-2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are weights alone
        trainer_fsdp2(folder, rank, world, **saving)
        for incomplete in (False, True):
            with pytest.raises(RunDirectoryError, match="keeps no optimizer state of a model that"):
                trainer_fsdp2(
                    again, rank, world, **saving, incomplete=incomplete, checkpoint=checkpoint
                )


def trainer_adapters(folder, rank, world):
    """Adapters on a model that transformers has sharded: it averages their gradients itself."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    base, config = folder.parent / "base", DistributedConfig(fsdp_size=world)
    model = LlamaForCausalLM.from_pretrained(base, distributed_config=config)
    trainer(folder, rank, world, with_adapters(model))


def refusals(folder, rank, world):
    """What becomes of the run directory, all processes do alike; none waits for the others."""
    model = DistributedDataParallel(small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def caught(name, **config):
        try:
            recorder(folder / name, model, optimizer, **config)
        except RunDirectoryError as error:
            return str(error)

    with recorder(folder / "run", model, optimizer) as record:
        assert isinstance(record.writer, SilentWriter if rank else RunWriter)
        step(model, optimizer, record, 1)
        record.checkpoint(1)
        step(model, optimizer, record, 2)
    words = ("the first process could not", "already holds a run")
    assert words[rank == 0] in caught("run")
    if rank == 0:
        (folder / "file").write_text("a file")
    dist.barrier()
    words = ("the first process could not", "cannot be written")
    assert words[rank == 0] in caught("file", on_record_error="raise")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with recorder(folder / "file", model, optimizer) as record:
            assert record.stopped
            step(model, optimizer, record, 1)
    assert len([w for w in said if "goes on unrecorded" in str(w.message)]) == (rank == 0)
    # A run is continued by the first process's writer; the others take no census either.
    config = lt.RecordConfig(str(folder / "run"), every=EVERY)
    rows = TensorTable(model, find_layers(model), None).rows
    writer = None
    if rank == 0:
        writer = RunWriter(folder / "run", manifest={}, parameters=rows, resume=True, step=1)
    with lt.NormRecorder(model, optimizer, config, writer, step=1) as record:
        assert record.writer.segment == 1
        step(model, optimizer, record, 2)


def step(model, optimizer, record, number):
    ids = batches(number)[0][dist.get_rank() :: dist.get_world_size()]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    record.before_step(number)
    optimizer.step()
    record.after_step(number, loss=loss)
    optimizer.zero_grad()


SCENARIOS = {
    "refusals": refusals,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "twice": twice,
    "adapters-fsdp2": adapters_fsdp2,
    "adapters-replicas": adapters_replicas,
    "adapters-beside": adapters_beside,
    "adapters-resumed": adapters_resumed,
    "routed-ddp": routed_ddp,
    "routed-fsdp2": routed_fsdp2,
    "reversed": reversed_order,
    "mixed": mixed_order,
    "resting": resting,
    "failing": failing,
    "failing-fsdp2": failing_fsdp2,
    "memory": memory,
    "trainer-ddp": trainer_ddp,
    "trainer-lisa": trainer_lisa,
    "trainer-saved": trainer_saved,
    "trainer-joined": trainer_joined,
    "trainer-fsdp2": trainer_fsdp2,
    "trainer-lisa-fsdp2": trainer_lisa_fsdp2,
    "trainer-fsdp2-saved": trainer_fsdp2_saved,
    "trainer-adapters": trainer_adapters,
}
# Each of them is, in parts, another scenario too.
SLOW = ("adapters-replicas", "trainer-saved", "trainer-fsdp2", "trainer-adapters")
