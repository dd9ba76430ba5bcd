"""What Trainer may not do to a model under LISA or the recorder, refused when they are attached."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_processes import ranks
from helpers_recording import arguments, examples, llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.training_args import ParallelMode

import lisa_train as lt
from lisa_analysis.contract.errors import ConfigError
from lisa_train.trainer.parallel_checks import without_wrapper


@pytest.fixture
def trainer(tmp_path):
    return Trainer(llama(), arguments(tmp_path, max_steps=1), train_dataset=examples())


def both(tmp_path):
    return {"lisa": lt.LisaConfig(1)}, {"record": lt.RecordConfig(str(tmp_path / "run"))}


def refused(trainer, asked):
    with pytest.raises(ConfigError) as error:
        lt.attach(trainer, **asked)
    return str(error.value)


def test_several_gpus_in_one_process(trainer, tmp_path):
    trainer.args._n_gpu = 2
    for asked in both(tmp_path):
        text = refused(trainer, asked)
        assert "this process sees 2 GPUs, for which Trainer takes torch.nn.DataParallel" in text
        assert "torchrun --nproc-per-node N" in text


def with_plugin(trainer, monkeypatch, **settings):
    class State(type(trainer.accelerator.state)):
        fsdp_plugin = SimpleNamespace(**settings)

    monkeypatch.setattr(trainer.accelerator, "state", State())


def test_fsdp_of_version_1(trainer, tmp_path, monkeypatch):
    with_plugin(trainer, monkeypatch, fsdp_version=1)
    for asked, who in zip(both(tmp_path), ("LISA", "the recorder"), strict=True):
        text = refused(trainer, asked)
        assert f"{who} does not work under FSDP version 1" in text
        assert "use DDP, or FSDP2 (fsdp_version 2)" in text


def test_fsdp2_that_keeps_weights_on_the_host(trainer, tmp_path, monkeypatch):
    from torch.distributed.fsdp import CPUOffloadPolicy

    offload = CPUOffloadPolicy(pin_memory=False)
    with_plugin(trainer, monkeypatch, fsdp_version=2, cpu_offload=offload)
    lisa, _ = both(tmp_path)
    assert "FSDP2 that keeps weights on the host (cpu_offload" in refused(trainer, lisa)


def test_state_on_the_host_and_whole_checkpoints(trainer, monkeypatch):
    offload = {"lisa": lt.LisaConfig(1, optimizer_state="offload")}
    with_plugin(trainer, monkeypatch, fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    assert "set state_dict_type in fsdp_config to SHARDED_STATE_DICT" in refused(trainer, offload)
    with_plugin(trainer, monkeypatch, fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    lt.attach(trainer, **offload)


@pytest.mark.parametrize(
    ("sizes", "words", "recorder"),
    [
        ({"tp_size": 2}, "tensor parallelism splits (tp_size is 2)", False),
        ({"cp_size": 2}, "share the positions of a sequence (cp_size is 2)", True),
        ({"sp_size": 4}, "share the positions of a sequence (sp_size is 4)", True),
        (
            {"dp_replicate_size": 2, "dp_shard_size": 4},
            "copies (HSDP: dp_replicate_size is 2, dp_shard_size 4)", False,
        ),
    ],
)  # fmt: skip
def test_what_else_processes_may_share(trainer, tmp_path, monkeypatch, sizes, words, recorder):
    from accelerate import ParallelismConfig

    config = ParallelismConfig(**sizes)
    kind = type(trainer.accelerator)
    monkeypatch.setattr(kind, "parallelism_config", property(lambda self: config))
    lisa, record = both(tmp_path)
    text = refused(trainer, lisa)
    assert words in text
    assert "LISA is not proved" in text
    if recorder:
        assert words in refused(trainer, record)


def fsdp_on_a_cpu(rank, folder):
    """What Trainer makes of `fsdp` in several processes without accelerators, and what we say."""
    said = {}
    for who, asked in zip(("LISA", "recorder"), both(Path(folder)), strict=True):
        given = arguments(Path(folder), max_steps=1, fsdp=True)
        trainer = Trainer(llama(), given, train_dataset=examples())
        said[f"{who}, split"] = trainer.is_fsdp_enabled
        try:
            lt.attach(trainer, **asked)
        except ConfigError as error:
            said[who] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(said))


@pytest.mark.processes
def test_fsdp_that_would_be_ddp_without_a_word(tmp_path):
    ranks(fsdp_on_a_cpu, tmp_path)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not said["LISA, split"]
        for who in ("LISA", "recorder"):
            assert "fsdp is set (trainer_args: fsdp" in said[who]
            assert "would train with a whole copy in every process" in said[who]


WAYS = {
    "pp_size": "where processes hold different layers (pipeline parallelism)",
    "tp_size": "weights that tensor parallelism splits",
}


def split_by_transformers(rank, folder):
    """What is said of models that transformers has loaded in other parts than FSDP2's."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    said = {}
    for way in WAYS:
        config = DistributedConfig(**{way: 2})
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "base", distributed_config=config)
        said[f"LISA, {way}"] = refused_in_a_loop("LISA", model, folder)
        if way == "pp_size":  # pieces of tensors are recorded as they are
            said[f"the recorder, {way}"] = refused_in_a_loop("the recorder", model, folder)
    Path(folder, f"{rank}.json").write_text(json.dumps(said))


def refused_in_a_loop(who, model, folder):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = lt.RecordConfig(str(Path(folder, "run")))
    start = {
        "LISA": lambda: lt.Lisa(model, optimizer, lt.LisaConfig(1)),
        "the recorder": lambda: lt.NormRecorder(model, optimizer, record),
    }[who]
    with pytest.raises(ConfigError) as error:
        start()
    return str(error.value)


@pytest.mark.processes
def test_models_that_transformers_splits_in_other_ways(tmp_path):
    llama(layers=4).save_pretrained(tmp_path / "base")
    ranks(split_by_transformers, tmp_path)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(said) == 3
        for key, text in said.items():
            who, way = key.split(", ")
            assert WAYS[way] in text
            assert text.startswith(who)


@pytest.mark.parametrize("who", ["LISA", "the recorder"])
def test_experts_of_their_own(trainer, tmp_path, who):
    trainer.model.config.distributed_config = SimpleNamespace(ep_size=4, pp_size=1)
    text = refused_in_a_loop(who, trainer.model, tmp_path)
    assert f"{who} is not proved where processes hold different experts" in text
    assert "DistributedConfig.ep_size is 4" in text


def test_a_file_of_accelerate_that_asks_for_fsdp_on_a_cpu(trainer, tmp_path, monkeypatch):
    """`accelerate launch` says so in the environment, and its accelerator passes it over."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for asked in both(tmp_path):
        text = refused(trainer, asked)
        assert "fsdp is set (trainer_args: fsdp, or the file of accelerate launch)" in text


def test_deepspeed(trainer, tmp_path):
    trainer.is_deepspeed_enabled = True
    for asked, who in zip(both(tmp_path), ("LISA", "the recorder"), strict=True):
        text = refused(trainer, asked)
        assert f"{who} cannot read gradients under DeepSpeed (its setting: deepspeed, or" in text
        assert "leave DeepSpeed out, and start one process per GPU (torchrun" in text


def test_other_kinds_of_processes(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.TPU)
    for asked in both(tmp_path):
        assert "is not proved with tpu processes" in refused(trainer, asked)


def test_several_processes_train_without_a_wrapper(trainer, monkeypatch):
    """LISA averages gradients itself; what else accelerate prepares stays."""
    seen = []

    def prepare_model(model, device_placement=None, evaluation_mode=False):
        seen.append((model is trainer.model, device_placement, evaluation_mode))
        return model

    monkeypatch.setattr(trainer.accelerator, "prepare_model", prepare_model)
    with without_wrapper(trainer):  # one process
        assert trainer.accelerator.prepare_model is prepare_model
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.DISTRIBUTED)
    with without_wrapper(trainer):
        trainer.accelerator.prepare_model(trainer.model, device_placement=True)
        trainer.accelerator.prepare_model(torch.nn.Linear(1, 1))
    assert seen == [(True, True, True), (False, None, False)]
    assert trainer.accelerator.prepare_model is prepare_model
    lt.attach(trainer, lisa=lt.LisaConfig(1, precision="fp32_active"))


def test_a_callback_that_was_added_by_hand_is_checked_when_training_begins(trainer):
    trainer.add_callback(lt.LisaCallback(lt.LisaConfig(1)))
    trainer._wrap_model = lambda model, *args, **kwargs: _see_more_gpus(trainer, model)
    with pytest.raises(ConfigError, match="this process sees 2 GPUs"):
        trainer.train()


def _see_more_gpus(trainer, model):
    trainer.args._n_gpu = 2
    return model


@pytest.mark.parametrize("k", [1, 3])
def test_ddp_that_waits_for_every_gradient_is_refused_where_layers_rest(trainer, k, monkeypatch):
    class Wrapped(DistributedDataParallel):
        """DDP as far as anybody asks it, without a process group."""

        find_unused_parameters = static_graph = False

        def __init__(self, inner):
            nn.Module.__init__(self)
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    callback = lt.LisaCallback(lt.LisaConfig(k, optimizer_state="keep"))
    trainer.add_callback(callback)
    trainer._wrap_model = lambda model, *args, **kwargs: Wrapped(model)
    if k == 3:
        trainer.train()
        return
    with pytest.raises(ConfigError, match="find_unused_parameters is off in DistributedDataPar"):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
