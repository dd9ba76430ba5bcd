"""A measuring pass: one backward pass with all tensors, of which only the norms are kept.

With several processes the norms are those of the gradient averaged over all of them. What FSDP2
shards it averages itself; for plain tensors see `lisa_train.measure.probe.averaged_gradients`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lisa_train.measure import faults
from lisa_train.measure.probe.averaged_gradients import Averaging
from lisa_train.measure.processes import Processes
from lisa_train.model.norms import squares, stacked
from lisa_train.model.sharding import is_sharded, requiring_gradients, reshard, unsynchronised
from lisa_train.model.tensor_table import TensorTable
from lisa_train.optim.step_in_backward import StepInBackward


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
            plain = stack.enter_context(stand_ins(self._model, set(numbers)))
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
        devices = sorted({p.device.index for p in self._model.parameters() if p.is_cuda})
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                backward()
        except Exception:
            # The others are waiting for this process; in a sharded model FSDP's own collectives
            # are what they wait for, and there is nothing that could be said to them.
            if averaging is not None and not sharded:
                averaging.finish(failed=True)
            raise
        if averaging is not None:
            averaging.finish()


class GuardedPasses:
    """Measuring passes until one fails: they are not the training's own, which goes on.

    Parameters
    ----------
    measure
        Makes one pass: takes a step, the backward pass and the factor on its loss.
    stepping
        What steps the optimizer inside the backward pass, if anything: it rests meanwhile.
    on_record_error
        See `RecordConfig`.
    sharded
        Whether weights are sharded: then a failure is raised, since it leaves FSDP between two
        collectives.

    Attributes
    ----------
    failed : bool
        Whether a pass has failed; no other is made.
    """

    def __init__(
        self,
        measure: Callable[[int, Callable[[], object], Any], None],
        stepping: StepInBackward | None,
        on_record_error: Literal["warn", "raise"],
        *,
        sharded: bool,
    ) -> None:
        self.failed = False
        self._measure = measure
        self._stepping = stepping
        self._on_record_error = on_record_error
        self._sharded = sharded

    def run(
        self, step: int, backward: Callable[[], object], scale: Any
    ) -> tuple[str, str | None] | None:
        """Make one pass; return what there is to say of its failure, and the traceback."""
        of_the_pass: list[Exception] = []

        def watched() -> None:
            try:
                backward()
            except Exception as error:
                of_the_pass.append(error)
                raise

        try:
            with self._stepping.paused() if self._stepping is not None else nullcontext():
                self._measure(step, watched, scale)
        except Exception as error:
            foreign = error in of_the_pass
            stops = faults.stops_training(error, self._on_record_error, foreign=foreign)
            if stops or self._sharded:
                raise
            self.failed = True
            why = faults.reason(error, foreign=foreign)
            text = f"probe_every: nothing is probed any more: {why}"
            return text, faults.full_traceback(error, foreign=foreign)
        return None


@contextmanager
def stand_ins(model: nn.Module, wanted: set[int]) -> Iterator[dict[int, nn.Parameter]]:
    """Put tensors of the same memory into the modules; yield them by the id of the real ones.

    Parameters
    ----------
    model
        The model. Sharded tensors and packed integers stay.
    wanted
        Ids of the tensors whose stand-ins require gradients; the others' do if they do.

    Notes
    -----
    Hooks, flags and gradients of the real tensors do not take part in a pass, so that there is
    nothing to put back: DDP counts which tensors a pass reached even outside its own forward.
    """
    found = {
        id(p): _stand_in(p, p.requires_grad or id(p) in wanted)
        for p in model.parameters()
        if p.is_floating_point() and not is_sharded(p)
    }
    places = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) in found
    ]
    try:
        for module, name, p in places:
            setattr(module, name, found[id(p)])
        yield found
    finally:
        for module, name, p in places:
            setattr(module, name, p)


def _stand_in(parameter: nn.Parameter, requires_grad: bool) -> nn.Parameter:
    kind = type(parameter)
    if kind is not nn.Parameter and issubclass(kind, nn.Parameter):  # with an attribute or two
        result = torch.Tensor._make_subclass(kind, parameter.detach(), requires_grad)
    else:
        result = nn.Parameter(parameter.detach(), requires_grad)
    vars(result).update(vars(parameter))
    return result


def _hook(
    take: Callable[[torch.Tensor, Any], None], number: int | None
) -> Callable[[torch.Tensor], None]:
    return lambda tensor: take(tensor, number)
