"""TRL's fused head, its gradient in slices: the same numbers, no fp32 copy of the head."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from lisa_train.trainer import trl_head as head_gradient
from lisa_train.trainer.trl_head import sliced_head_gradient

VOCABULARY = 700


def build(dtype, bias=False, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY).to(dtype) / 10)
    return model


def batch():
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :15] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def fused(dtype, **changes):
    model = build(dtype, **changes)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(head_gradient, "SLICE", 96)  # 700 is no multiple of it


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [4096, 16], ids=["one-chunk", "chunks-of-tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradients_are_those_of_whole_logits(monkeypatch, dtype, tokens, bias):
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", tokens)
    exact = build(dtype, bias).double()
    exact(**batch()).loss.backward()
    whole, sliced = fused(dtype, bias=bias), fused(dtype, bias=bias)
    losses = [whole(**batch(), fused_lm_head=True).loss]
    losses[0].backward()
    with sliced_head_gradient():
        losses.append(sliced(**batch(), fused_lm_head=True).loss)
        losses[1].backward()
    assert torch.equal(*losses)
    reference, theirs, ours = gradients(exact), gradients(whole), gradients(sliced)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - reference[name]).norm() / reference[name].norm()
        before = (theirs[name] - reference[name]).norm() / reference[name].norm()
        assert error <= 1.05 * before + 1e-6, name
    # A slice of the head is the very sum that TRL makes.
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def test_a_tied_head(monkeypatch):
    whole, sliced = (fused(torch.bfloat16, tie_word_embeddings=True) for _ in range(2))
    whole(**batch(), fused_lm_head=True).loss.backward()
    with sliced_head_gradient():
        sliced(**batch(), fused_lm_head=True).loss.backward()
    ours, theirs = gradients(sliced), gradients(whole)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 4e-3 * theirs[name].norm(), name


class LargestFp32(TorchDispatchMode):
    """Elements of the largest fp32 tensor with a vocabulary's worth of rows or columns."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        wide = isinstance(result, torch.Tensor) and result.dtype == torch.float32
        if wide and result.ndim == 2 and result.shape[1] == 32:
            self.rows = max(self.rows, result.shape[0])
        return result


@pytest.mark.parametrize("ours", [False, True])
def test_no_fp32_tensor_is_as_large_as_the_head(ours):
    model = fused(torch.bfloat16)
    loss = None
    if ours:
        with sliced_head_gradient():
            loss = model(**batch(), fused_lm_head=True).loss
    else:
        loss = model(**batch(), fused_lm_head=True).loss
    with LargestFp32() as seen:
        loss.backward()
    assert seen.rows == (96 if ours else VOCABULARY)


def test_a_head_at_rest_is_left_to_trl():
    model = fused(torch.bfloat16)
    model.lm_head.requires_grad_(False)
    with sliced_head_gradient():
        model(**batch(), fused_lm_head=True).loss.backward()
    other = fused(torch.bfloat16)
    other.lm_head.requires_grad_(False)
    other(**batch(), fused_lm_head=True).loss.backward()
    assert gradients(model).keys() == gradients(other).keys()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(other)[name])


def test_trl_is_as_it_was_afterwards(monkeypatch):
    before = utils._ChunkedLogProbFunction

    def fail():
        with sliced_head_gradient():
            assert utils._ChunkedLogProbFunction is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert utils._ChunkedLogProbFunction is before
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with sliced_head_gradient():
        assert not hasattr(utils, "_ChunkedLogProbFunction")
    monkeypatch.delitem(sys.modules, "trl.trainer.utils")
    with sliced_head_gradient():
        assert "trl.trainer.utils" not in sys.modules
