"""What CUDA runs where the CPU's route through torch would keep other tensors."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lisa_train.private_names import check


class CudaKernels(TorchFunctionMode):
    """Lets a model on fake CPU tensors save for backward what it would save on CUDA.

    * Dropout saves a mask of one byte per element (`native_dropout`), not a tensor of the input's
      type.
    * `scaled_dot_product_attention` takes the flash kernel, which saves query, key, value, output
      and the log-sum-exp, with dropout too (CUDA's keeps a seed, the CPU has none for it). Query
      heads that share keys in fp32 have no such kernel on CUDA and take the plain one.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout or func is torch.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **other: Any
) -> torch.Tensor:
    training = other.pop("train", training)
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    names = ("attn_mask", "dropout_p", "is_causal")
    settings = {**dict(zip(names, args, strict=False)), **kwargs, "dropout_p": 0.0}
    compute = query.dtype
    if torch.is_autocast_enabled("cpu"):
        compute = torch.get_autocast_dtype("cpu")
    shared = query.shape[-3] != key.shape[-3]
    without_kernel = compute == torch.float32 and shared and settings.get("enable_gqa", False)
    with sdpa_kernel(SDPBackend.MATH) if without_kernel else contextlib.nullcontext():
        return F.scaled_dot_product_attention(query, key, value, **settings)


@contextlib.contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Rows that hold one sequence each, which transformers cannot see without data.

    It would otherwise build a mask as for packed sequences.
    """
    from transformers import masking_utils

    with _replaced(masking_utils, find_packed_sequence_indices=lambda position_ids: None):
        yield


@contextlib.contextmanager
def tiles_in_place() -> Iterator[None]:
    """TRL's chunked head as its Triton kernels run it: a tile of logits is worked on in place.

    Its route for other devices makes several fp32 copies of a tile.
    """
    check("estimate trl")
    from trl.kernels import chunked_logprob

    with _replaced(
        chunked_logprob,
        _forward_tile=lambda *_, **__: None,
        _backward_tile=lambda *_, **__: None,
        _addmm_fp32=lambda accumulator, a, b: None,
    ):
        yield


# Whoever replaces functions puts back what was there: in turns, that is the original.
_IN_TURNS = threading.RLock()


@contextlib.contextmanager
def _replaced(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """Let other functions stand in a module for what this thread calls there, and no other."""
    with _IN_TURNS:
        before = {name: getattr(module, name) for name in functions}
        for name, function in functions.items():
            setattr(module, name, _in_this_thread(function, before[name]))
        try:
            yield
        finally:
            for name, original in before.items():
                setattr(module, name, original)


def _in_this_thread(function: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    here = threading.get_ident()

    @functools.wraps(others)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == here else others)(*args, **kwargs)

    return chosen
