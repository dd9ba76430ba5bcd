"""The gradient of a head that trains, in slices of the vocabulary, for TRL's fused head.

TRL's head never holds the logits whole, but it sums the gradient of its own weights whole, in fp32,
and then copies it into the weights' precision: six bytes per weight, at the moment when all
activations stand. For a vocabulary of 128,256 and a width of 4,096 that is 3.2 GB. Here TRL's own
backward pass runs on one slice of the vocabulary after the other, so that sums in fp32 exist for
one slice alone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

# Rows of the head that are worked on at once: 134 MB of fp32 sums at a width of 4,096.
SLICE = 8192
_NAME = "_ChunkedLogProbFunction"


def sliced(function: Any) -> Any:
    """Return TRL's autograd function with a backward pass that goes slice by slice.

    Parameters
    ----------
    function
        `trl.kernels.chunked_logprob.ChunkedLogProbFunction`.

    Returns
    -------
    type
        A subclass with the same arguments and results. The gradients are sums of the same
        products in fp32; only the order in which slices are added to the hidden states' is new.
    """

    class SlicedHead(function):  # type: ignore[misc]
        """TRL's head; where the weights train, backward goes slice by slice."""

        @staticmethod
        def backward(
            ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
        ) -> tuple[torch.Tensor | None, ...]:
            weight = ctx.saved_tensors[1]
            whole = weight.dtype == torch.float32  # where the fp32 sums are the gradient
            if not ctx.needs_input_grad[1] or whole or hasattr(weight, "ds_id"):  # DeepSpeed's
                return tuple(function.backward(ctx, grad_logprobs, grad_entropy))
            return _by_slices(function, ctx, grad_logprobs, grad_entropy)

    return SlicedHead


def _by_slices(
    function: Any, ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, targets, *statistics = ctx.saved_tensors
    wide = hidden.float()  # so that TRL's sums over slices are handed back in fp32
    of_hidden = torch.zeros_like(wide) if ctx.needs_input_grad[0] else None
    of_weight = torch.empty_like(weight)
    of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
    for start in range(0, len(weight), SLICE):
        rows = slice(start, start + SLICE)
        part = SimpleNamespace(
            # A target outside the slice matches none of its rows.
            saved_tensors=(
                wide, weight[rows], None if bias is None else bias[rows], targets - start,
                *statistics,
            ),
            needs_input_grad=ctx.needs_input_grad,
            compute_dtype=ctx.compute_dtype,
            chunk_size=SLICE,
            kernel_args=ctx.kernel_args,
        )  # fmt: skip
        passed, own, offset, *_ = function.backward(part, grad_logprobs, grad_entropy)
        of_weight[rows] = own
        if of_hidden is not None:
            of_hidden += passed
        if of_bias is not None:
            of_bias[rows] = offset
    passed = None if of_hidden is None else of_hidden.to(hidden.dtype)
    return (passed, of_weight, of_bias, *[None] * 6)


@contextmanager
def sliced_head_gradient() -> Iterator[None]:
    """Let TRL's fused heads go slice by slice within the block; where TRL is not in use, nothing.

    TRL looks the function up at every forward pass, so that models that exist already take part.
    """
    utils = sys.modules.get("trl.trainer.utils")
    before = getattr(utils, _NAME, None)  # TRL's own business: another version may lack it
    if utils is None or before is None:
        yield
        return
    setattr(utils, _NAME, sliced(before))
    try:
        yield
    finally:
        setattr(utils, _NAME, before)
