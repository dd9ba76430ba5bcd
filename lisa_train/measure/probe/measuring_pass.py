"""A measuring pass: one backward pass with all tensors, of which only the norms are kept.

With several processes the norms are those of the gradient averaged over all of them. FSDP2
averages sharded tensors itself; for the others see `lisa_train.measure.probe.averaged_gradients`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from lisa_train.measure import faults
from lisa_train.measure.probe.averaged_gradients import Averaging
from lisa_train.measure.processes import Processes
from lisa_train.model.norms import squares, stacked
from lisa_train.model.sharding import requiring_gradients, reshard, unsynchronised
from lisa_train.model.side_pass import fresh_leaves, random_state_kept
from lisa_train.model.tensor_table import TensorTable
from lisa_train.optim.step_in_backward import StepInBackward

# Backward passes, one for each batch.
Passes = Sequence[Callable[[], object]]
T = TypeVar("T")


class Probe:
    """Runs measuring passes on a model.

    Plain tensors take no part: others of the same memory stand in for them, so that nothing
    that hangs on the real ones (DDP, a step inside backward) notices. Sharded ones do, because
    FSDP puts them into the modules itself; their flags and gradients are put back.

    Parameters
    ----------
    model
        The model.
    table
        Its tensors; those that it selects are measured.
    processes
        The processes that train the model.
    """

    def __init__(self, model: nn.Module, table: TensorTable, processes: Processes) -> None:
        self._model = model
        self._table = table
        self._processes = processes

    def run(self, backward: Callable[[], object]) -> tuple[np.ndarray, torch.Tensor]:
        """Return the numbers of the tensors reached, and this process's parts of ‖g‖² of each.

        All processes call it together; a failure of one is raised in all of them. Only in a
        sharded model the others wait for the one that failed, as they do in training.
        """
        numbers = {id(p): i for i, p in self._table.tensors}
        found: dict[int, torch.Tensor] = {}
        twice: set[int] = set()

        def take(tensor: torch.Tensor, number: int | None) -> None:
            """Keep the norm of a complete gradient, or only drop it where nobody asks."""
            if number in found:
                twice.add(number)
            elif number is not None and tensor.grad is not None:
                found[number] = squares([tensor.grad])[0]
            tensor.grad = None

        # What is still gathered would be taken for a plain tensor, and keep the flags that it has.
        reshard(self._model)
        with ExitStack() as stack:
            plain = stack.enter_context(fresh_leaves(self._model, set(numbers)))
            sharded = stack.enter_context(requiring_gradients(self._model, set(numbers)))
            stack.enter_context(unsynchronised(self._model))
            averaging = None
            measured = {numbers[key]: p for key, p in plain.items() if key in numbers}
            if self._processes.count > 1 and measured:
                averaging = Averaging(self._table, measured, self._processes, at_once=not sharded)
            for key, tensor in {**plain, **sharded}.items():
                number = numbers.get(key)
                if not tensor.requires_grad:
                    continue
                if averaging is not None and key in plain and number is not None:
                    hook = _hook(averaging.take, number)
                else:
                    hook = _hook(take, number)
                stack.callback(tensor.register_post_accumulate_grad_hook(hook).remove)
            self._pass(backward, averaging, bool(sharded))
            if averaging is not None:
                found.update(averaging.found)
        # The norm of a gradient that came in two parts, the first gone by then, is not known.
        ids = sorted(found.keys() - twice)
        values = stacked([found[i] for i in ids]) if ids else torch.zeros(0)
        return np.array(ids, dtype=np.int64), values

    def _pass(
        self, backward: Callable[[], object], averaging: Averaging | None, sharded: bool
    ) -> None:
        try:
            with random_state_kept(self._model), torch.enable_grad():
                backward()
        except Exception:
            # The other processes wait for this one. Where the model is sharded they wait in
            # FSDP's own all-reduces, and cannot be told.
            if averaging is not None and not sharded:
                averaging.finish(failed=True)
            raise
        if averaging is not None:
            averaging.finish()


class GuardedPasses(Generic[T]):
    """Measuring passes until one fails: they are not the training's own, which goes on.

    Parameters
    ----------
    measure
        Makes the passes of a step: takes the step, the backward passes and the factor on their
        losses.
    stepping
        What steps the optimizer inside the backward pass, if anything: it rests meanwhile.
    on_record_error
        See `RecordConfig`.
    sharded
        Whether weights are sharded: then a failure is raised, since it leaves FSDP between two
        collectives.
    say
        Takes what there is to say of a failure, and the traceback.

    Attributes
    ----------
    failed : bool
        Whether a pass has failed; no other is made.
    """

    def __init__(
        self,
        measure: Callable[[int, Passes, Any], T],
        stepping: StepInBackward | None,
        on_record_error: Literal["warn", "raise"],
        *,
        sharded: bool,
        say: Callable[[str, str | None], None],
    ) -> None:
        self.failed = False
        self._measure = measure
        self._stepping = stepping
        self._on_record_error = on_record_error
        self._sharded = sharded
        self._say = say

    def run(self, step: int, passes: Passes, scale: Any) -> T | None:
        """Make the passes of a step; return what `measure` does, or None after a failure."""
        of_the_pass: list[Exception] = []

        def watched(backward: Callable[[], object]) -> None:
            try:
                backward()
            except Exception as error:
                of_the_pass.append(error)
                raise

        try:
            with self._stepping.paused() if self._stepping is not None else nullcontext():
                return self._measure(step, [partial(watched, one) for one in passes], scale)
        except Exception as error:
            foreign = error in of_the_pass
            stops = faults.stops_training(error, self._on_record_error, foreign=foreign)
            if stops or self._sharded:
                raise
            self.failed = True
            why = faults.reason(error, foreign=foreign)
            text = f"probe_every: nothing is probed any more: {why}"
            self._say(text, faults.full_traceback(error, foreign=foreign))
            return None


def _hook(
    take: Callable[[torch.Tensor, Any], None], number: int | None
) -> Callable[[torch.Tensor], None]:
    return lambda tensor: take(tensor, number)
