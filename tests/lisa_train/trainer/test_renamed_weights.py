"""A checkpoint under other names than the model's is loaded whole: Trainer would leave most out."""

import copy
from pathlib import Path

import pytest
import torch
from helpers_architectures import build

from lisa_train.trainer.renamed_weights import is_renamed, load_renamed


@pytest.mark.parametrize(
    ("name", "renamed"), [("vit", True), ("llama", False), ("gpt2", False), ("t5", False)]
)
def test_every_tensor_comes_back(name: str, renamed: bool, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    assert is_renamed(model, tmp_path) == renamed
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1)
    load_renamed(other, tmp_path)
    before, after = model.state_dict(), other.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
