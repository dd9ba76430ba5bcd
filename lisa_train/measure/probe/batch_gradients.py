"""The gradients of single batches, tensor by tensor: numbers are taken, gradients are dropped."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.probe.sketch import BUCKETS, Sketch
from lisa_train.model.norms import inner_products, squares, squares_and_magnitudes, stacked
from lisa_train.model.side_pass import fresh_leaves, random_state_kept

_COLUMNS = ("square", "magnitude", "taylor")
# Share of the free memory that the sums of the gradients may take.
_SHARE = 0.5


class BatchGradients:
    """Numbers of every tensor in every batch, and what the batches have in common.

    Parameters
    ----------
    tensors
        Numbers and tensors; plain ones, on any devices.
    exact
        Keep the sum of all gradients (fp32, as many elements as the tensors), so that the signal
        is that of the gradients themselves. Without it the signal is that of their sketches.
    seed
        Of the sketches' signs.
    """

    def __init__(
        self, tensors: Sequence[tuple[int, torch.Tensor]], *, exact: bool, seed: int = 0
    ) -> None:
        self.ids = np.array([number for number, _ in tensors], dtype=np.int64)
        self.exact = exact
        self._tensors = dict(tensors)
        self._sketch = Sketch(seed)
        self._sums: dict[int, torch.Tensor] = {}
        self._sketches: list[dict[int, torch.Tensor]] = []
        self._numbers: list[dict[int, tuple[torch.Tensor, ...]]] = []
        self._now: dict[int, tuple[torch.Tensor, ...]] = {}
        self._sketched: dict[int, torch.Tensor] = {}

    @property
    def batches(self) -> int:
        """Number of batches that are complete."""
        return len(self._numbers)

    @contextmanager
    def of(self, model: nn.Module, scale: Any = 1.0) -> Iterator[None]:
        """Take the gradients of every backward pass inside, each dropped when it is taken.

        Tensors of the same memory stand in for the model's own, which are not touched: frozen ones
        have gradients too, and no hook, flag or gradient of theirs takes part. The random state is
        put back at the end.

        Parameters
        ----------
        model
            The model; none of its tensors is sharded.
        scale
            Factor on the losses (fp16), a number or a tensor of one element.
        """
        numbers = {id(tensor): number for number, tensor in self._tensors.items()}

        def hook(number: int | None) -> Callable[[torch.Tensor], None]:
            def take(leaf: torch.Tensor) -> None:
                if number is not None and leaf.grad is not None:
                    unscaled = isinstance(scale, float) and scale == 1.0
                    self.take(number, leaf.grad if unscaled else leaf.grad.float() / scale)
                leaf.grad = None

            return take

        with (
            random_state_kept(model),
            torch.enable_grad(),
            fresh_leaves(model, set(numbers)) as found,
        ):
            hooks = [
                leaf.register_post_accumulate_grad_hook(hook(numbers.get(key)))
                for key, leaf in found.items()
                if leaf.requires_grad
            ]
            try:
                yield
            finally:
                for handle in hooks:
                    handle.remove()

    @torch.no_grad()
    def take(self, number: int, gradient: torch.Tensor) -> None:
        """Take the numbers of a complete gradient, which need not live on.

        Raises
        ------
        LisaError
            When the batch has brought this tensor a gradient already.
        """
        if number in self._now:
            raise LisaError(
                f"the backward pass of one batch came to tensor {number} twice: its gradient is "
                "not known. Use gradient checkpointing with use_reentrant=False, and one backward "
                "pass per batch."
            )
        weight = self._tensors[number]
        square, magnitude = squares_and_magnitudes([gradient])
        product = inner_products([gradient], [weight])
        self._now[number] = (square[0], magnitude[0], product[0])
        self._sketched[number] = self._sketch(number, gradient)
        if self.exact:
            if number not in self._sums:
                self._sums[number] = torch.zeros_like(gradient, dtype=torch.float32)
            self._sums[number] += gradient

    def end_batch(self) -> None:
        """Close a batch; a tensor that it did not reach has a gradient of zero in it."""
        self._numbers.append(self._now)
        self._sketches.append(self._sketched)
        self._now, self._sketched = {}, {}

    def reached(self) -> np.ndarray:
        """Numbers of the tensors that any batch reached, ascending."""
        return np.array(sorted({i for batch in self._numbers for i in batch}), dtype=np.int64)

    def numbers(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return `square`, `magnitude` and `taylor`, each of shape (batches, tensors), float64.

        ‖g‖², ‖g‖₁ and ⟨g, θ⟩ of the gradient of every batch.
        """
        found = np.zeros((self.batches, len(ids), len(_COLUMNS)))
        where = {int(i): n for n, i in enumerate(ids)}
        flat = [(b, i, x) for b, batch in enumerate(self._numbers) for i, x in batch.items()]
        if flat:
            values = stacked([x for _, _, row in flat for x in row]).cpu().double().numpy()
            for (b, i, _), row in zip(flat, values.reshape(-1, len(_COLUMNS)), strict=True):
                found[b, where[i]] = row
        return {name: found[..., n] for n, name in enumerate(_COLUMNS)}

    def sketches(self, number: int) -> np.ndarray:
        """Return the sketches of a tensor's gradients, shape (batches, buckets), float64."""
        nothing = torch.zeros(BUCKETS)
        rows = [batch.get(number, nothing).cpu() for batch in self._sketches]
        return torch.stack(rows).double().numpy() if rows else np.zeros((0, BUCKETS))

    def sum_squares(
        self, ids: np.ndarray, added: Callable[[torch.Tensor], torch.Tensor]
    ) -> np.ndarray:
        """Return ‖Σ_b g_b‖² of every tensor, shape (tensors,), float64; needs `exact`.

        `added` returns the sum of a tensor over all processes.
        """
        found = []
        for i in ids.tolist():
            part = self._sums.get(i)
            if part is None:  # reached by another process alone
                part = torch.zeros_like(self._tensors[i], dtype=torch.float32)
            found.append(squares([added(part.clone())])[0])
        return stacked(found).cpu().double().numpy() if found else np.zeros(0)


def agreement(
    squares: np.ndarray, sketches: Sequence[np.ndarray], sum_squares: np.ndarray | None
) -> np.ndarray:
    """⟨g_b, mean of the other batches' gradients⟩ of every batch and tensor.

    Parameters
    ----------
    squares
        Shape (batches, tensors): ‖g_b‖².
    sketches
        One array per tensor, shape (batches, buckets).
    sum_squares
        Shape (tensors,): ‖Σ g_b‖² of the gradients themselves; None where they were not kept.

    Returns
    -------
    numpy.ndarray
        Shape (batches, tensors). The mean over the batches is the signal: exact with
        `sum_squares`, else that of the sketches. How single batches lie about the mean is always
        that of the sketches.
    """
    n = len(squares)
    result = np.zeros(squares.shape)
    if n < 2:
        return np.full(squares.shape, np.nan)
    for column, sketch in enumerate(sketches):
        total = sketch.sum(axis=0)
        own = np.einsum("bm,bm->b", sketch, sketch)
        result[:, column] = (sketch @ total - own) / (n - 1)
    if sum_squares is not None:
        exact = (sum_squares - squares.sum(axis=0)) / (n * (n - 1))
        result += exact - result.mean(axis=0)
    return result


def sums_fit(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether fp32 sums of all gradients take at most half of what is free on their devices."""
    needed: dict[torch.device, int] = {}
    for tensor in tensors:
        needed[tensor.device] = needed.get(tensor.device, 0) + 4 * tensor.numel()
    return all(size <= _SHARE * _free_bytes(device) for device, size in needed.items())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
