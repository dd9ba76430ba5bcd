"""One line attaches LISA to TRL's trainers: SFT, DPO and reward."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lisa_train as lt

# 2026-11-23: raised inside TRL, peft and transformers; nothing of it is called here directly
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven"]


def texts(n, shift=0):
    return [" ".join(WORDS[(i * 3 + j + shift) % len(WORDS)] for j in range(6)) for i in range(n)]


def preference():
    return Dataset.from_dict(
        {"prompt": texts(16), "chosen": texts(16, 1), "rejected": texts(16, 5)}
    )


def sft(folder, out):
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    data = Dataset.from_dict({"text": texts(16)})
    return SFTTrainer(
        model,
        SFTConfig(str(out), **ARGUMENTS),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def dpo(folder, out, reference=None, **changes):
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    return DPOTrainer(
        model,
        reference,
        args=DPOConfig(str(out), **{**ARGUMENTS, **changes}),
        train_dataset=preference(),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def reward(folder, out):
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    data = Dataset.from_dict({"chosen": texts(16, 1), "rejected": texts(16, 5)})
    return RewardTrainer(
        model,
        RewardConfig(str(out), **ARGUMENTS),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("build", [sft, dpo, reward])
def test_stepping_inside_backward_is_the_ordinary_step(tiny_model_dir, tmp_path, build):
    ends = []
    for inside in (False, True):
        trainer = build(tiny_model_dir, tmp_path / str(inside))
        if build is reward:  # its head is new: the same one for both
            torch.nn.init.ones_(trainer.model.score.weight)
        trainer.args.max_grad_norm = 0.0
        lt.attach(trainer, lisa=lt.LisaConfig(1, 2), step_in_backward=inside)
        trainer.train()
        ends.append(trainer.model.state_dict())
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


@pytest.mark.parametrize("build", [sft, dpo, reward])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_line_trains_the_drawn_layers_and_only_them(
    tiny_model_dir, tmp_path, build, checkpointing
):
    trainer = build(tiny_model_dir, tmp_path)
    trainer.args.gradient_checkpointing = checkpointing
    trainer.args.activation_checkpointing = checkpointing
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    attached = lt.attach(trainer, lisa=lt.LisaConfig(1, 2, always_active=("norm",)))
    drawn = []
    attached.engine_callback.on_draw.append(drawn.append)
    trainer.train()
    layer_map = attached.engine_callback.engine.layer_map
    assert [draw.step for draw in drawn] == [0, 2, 4]
    ever = {i for draw in drawn for i in draw.layers}
    expected = {n for i in ever for n in layer_map.layers[i]} | set(layer_map.groups["norm"])
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == expected
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_lisa_and_an_adapter_are_refused(tiny_model_dir, tmp_path):
    import peft
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        SFTConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": texts(16)}),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=peft.LoraConfig(target_modules=["q_proj"]),
    )
    with pytest.raises(lt.LisaError, match=r"PEFT adapters.*merge"):
        lt.attach(trainer, lisa=lt.LisaConfig(1, 2))


def test_the_reference_of_preferences_is_that_of_the_checkpoint(tiny_model_dir, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3}
    checkpoint = str(tmp_path / "out" / "checkpoint-3")

    def trained(reference=None, resume=None, **changes):
        trainer = dpo(tiny_model_dir, tmp_path / "out", reference, **saves, **changes)
        lt.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = trained()
    again = trained(resume=checkpoint)
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(lt.LisaError, match="another reference model"):
        trained(other, resume=checkpoint)
    with pytest.raises(lt.LisaError, match="the reference model as it was synchronised"):
        trained(resume=checkpoint, sync_ref_model=True)


@pytest.mark.parametrize("build", [dpo, reward])
def test_halves_of_a_batch_of_pairs_are_no_halves(tiny_model_dir, tmp_path, build):
    learn = lt.LearnConfig(metric="signal")
    lisa = lt.LisaConfig(1, 2, sampling="balanced", learn=learn)
    with pytest.raises(lt.LisaError, match="all chosen and all rejected texts: set gradient_acc"):
        lt.attach(build(tiny_model_dir, tmp_path), lisa=lisa)


def test_passes_of_a_reference_turn_checkpointing_on_again(tiny_model_dir, tmp_path):
    lisa = lt.LisaConfig(1, 2, recompute="frozen")
    with pytest.raises(lt.LisaError, match="DPOTrainer turns checkpointing on for all layers"):
        lt.attach(dpo(tiny_model_dir, tmp_path), lisa=lisa)
