"""Adapters of PEFT: what one layer's adapter is worth, against adapters taken off by hand."""

import copy
import re

import numpy as np
import pytest
import torch
from helpers_ablating import ADAPTERS, build, prepared, rows_of, stored, trained_adapter
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from lisa_analysis.contract.errors import ConfigError
from lisa_train.measure.ablation.ablating import ablate_units
from lisa_train.measure.ablation.change import LearnedChange
from lisa_train.measure.ablation.file import AblationFile, Key
from lisa_train.measure.ablation.units import AblatedUnit, make_units

ABOUT = {"model": "adapter", "base": "b", "dtype": "float32", "device": "cpu", "unmeasured": []}


def ablate(tmp_path, change, rows, units, folder="run", **options):
    losses, examples = prepared(change.model, rows)
    (tmp_path / folder).mkdir()
    file = AblationFile(tmp_path / folder, ABOUT, {"held_out": examples.measured})
    ablate_units(change, losses, {"held_out": examples}, units, file, progress=False, **options)
    return {key: values.data for key, values in file.losses.items()}, losses, examples


def measure(losses, examples, model):
    found = np.empty(len(examples.measured.tokens))
    with torch.no_grad():
        for batch in examples.batches:
            found[list(batch.examples)] = losses(model, batch.inputs)
    return found


def layer_of(path):
    """By the names of these models alone."""
    match = re.search(r"(?:layers|layer|h|block)\.(\d+)\.", path)
    encoder = {"decoder.block": 3, "decoder.layers": 2}  # its layers come first
    before = sum(count for part, count in encoder.items() if part in path)
    return None if match is None else int(match[1]) + before


def without(model, base, layers):
    """The trained model with adapters of some layers off: PEFT's own flags, base tensors copied."""
    start = dict(base.state_dict())
    with torch.no_grad():
        for path, module in model.named_modules():
            if layer_of(path + ".") not in layers:
                continue
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(False)
        for name, p in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in start and layer_of(plain) in layers and ".modules_to_save." not in name:
                p.copy_(start[plain])
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(tmp_path, name):
    architecture, base, loaded = trained_adapter(tmp_path, name)
    rows = rows_of(architecture)
    flags = {n: p.requires_grad for n, p in loaded.named_parameters()}
    before = {n: t.clone() for n, t in loaded.state_dict().items()}
    change = LearnedChange(loaded, stored(loaded, tmp_path / "base"))
    assert change.unmeasured == []
    all_of_it = AblatedUnit("0-9", None, tuple(change.parts))
    units = [*make_units(change.parts, change.kinds), all_of_it]
    found, losses, examples = ablate(tmp_path, change, rows, units)
    slow, *_ = ablate(tmp_path, change, rows, units, folder="slow", reuse=False)
    assert all(np.array_equal(found[key], slow[key]) for key in found)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == flags
    assert all(torch.equal(t, before[n]) for n, t in loaded.state_dict().items())

    def of(unit, mode):
        return found[Key(unit, None, mode, "held_out")]

    assert np.array_equal(of(None, "base"), measure(losses, examples, base))
    assert np.array_equal(of("0-9", "reset"), of(None, "base"))
    assert np.array_equal(of("0-9", "keep"), of(None, "trained"))
    assert np.array_equal(of(None, "trained"), measure(losses, examples, loaded))
    assert not np.array_equal(of(None, "trained"), of(None, "base"))
    for unit in range(len(change)):
        others = {*range(len(change)), None} - {unit}
        for mode, off in (("reset", {unit}), ("keep", others)):
            hand = measure(losses, examples, without(copy.deepcopy(loaded), base, off))
            assert np.array_equal(of(str(unit), mode), hand), (unit, mode)


def test_which_units_there_are(tmp_path):
    *_, loaded = trained_adapter(tmp_path, "modules_to_save")
    change = LearnedChange(loaded, stored(loaded, tmp_path / "base"))
    units = make_units(change.parts, change.kinds, "kind")
    assert [str(u) for u in units] == [
        *(f"{i} {kind}" for i in range(3) for kind in ("attn.q", "attn.v", "mlp.down", "norm")),
        "head",
        "norm",
    ]


def test_a_merged_adapter_is_refused(tmp_path):
    *_, loaded = trained_adapter(tmp_path, "plain")
    loaded.merge_adapter()
    with pytest.raises(ConfigError, match=r"q_proj is merged .* unmerge it"):
        LearnedChange(loaded, stored(loaded, tmp_path / "base"))


def test_prompts_are_refused(tmp_path):
    from peft import PromptTuningConfig

    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    prompts = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="PROMPT_TUNING, which has no layers"):
        LearnedChange(prompts, stored(prompts, tmp_path / "base"))


def test_a_head_that_is_new_stays_as_trained(tmp_path):
    """The base has no classifier: what it started as is not known."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    classifier = build("bert_classifier")
    settings = BertConfig(**classifier.config.to_dict())
    torch.manual_seed(5)
    BertForMaskedLM(settings).save_pretrained(tmp_path / "base")
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        fresh, LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )
    change = LearnedChange(adapted, stored(adapted, tmp_path / "base"))
    assert "classifier.weight" in change.unmeasured
    assert not any(part.name.startswith("classifier") for part in change.parts)
