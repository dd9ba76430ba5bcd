"""How far weights are from where they began: the products of adapters, and base weights."""

from typing import Any

import numpy as np
from torch import nn

from lisa_train.measure.adapters.lora_pairs import LoraPair
from lisa_train.measure.adapters.lora_products import joined_delta_squares, product_squares
from lisa_train.measure.adapters.search import find_lora_pairs
from lisa_train.measure.buffers import MetricBuffer
from lisa_train.measure.processes import Processes
from lisa_train.measure.step.base_weights import BaseWeights
from lisa_train.measure.step.parts import Part
from lisa_train.measure.step.step_tensors import Numbered, StepTensors
from lisa_train.model.norms import stacked
from lisa_train.model.sharding import local_slices
from lisa_train.model.tensor_table import TensorTable


class AdapterProducts(Part):
    """‖sBA − s₀B₀A₀‖² and ‖W + sBA‖² of LoRA adapters, on the row of B."""

    measures = frozenset({"delta_norm", "merged_norm"})

    def __init__(
        self,
        want: frozenset[str],
        table: TensorTable,
        buffer: MetricBuffer,
        model: nn.Module,
        processes: Processes,
    ) -> None:
        super().__init__(want, table, buffer)
        self.pairs = _pairs(model, table) if self.want else []
        self._processes = processes
        self._now: StepTensors | None = None

    def update(self, now: StepTensors, clip_coef: Any) -> None:
        """Take note of the tensors that have been joined, factors among them."""
        self._now = now

    def forget(self) -> None:
        """Let go of them."""
        self._now = None

    def state(self, step: int, active: Numbered) -> None:
        """Measure the changes of the adapters that trained in the step."""
        if "delta_norm" not in self.want or not self.pairs:
            return
        trained = {i for i, _ in active}
        pairs = [p for p in self.pairs if self.table.ids[p.name_b] in trained]
        now = self._now
        if now is not None and now.joined is not None and now.joined.is_after:
            places = {id(p): place for place, (_, p) in enumerate(now.tensors[: now.small])}
            found, squares = joined_delta_squares(pairs, now.joined, places)
            ids = np.array([self.table.ids[pairs[i].name_b] for i in found], dtype=np.int64)
            self.buffer.add(step, "delta_norm", ids, squares)
            known = set(found)
            pairs = [pair for i, pair in enumerate(pairs) if i not in known]
        self._add(step, pairs, census=False)

    def census(self, step: int) -> None:
        """Measure all adapters and the adapted weights."""
        self._add(step, self.pairs, census=True)

    def _add(self, step: int, pairs: list[LoraPair], *, census: bool) -> None:
        if not pairs:
            return
        ids = np.array([self.table.ids[pair.name_b] for pair in pairs])
        # Reading the weights under the adapters is not for every step: they are many times
        # larger. At step 0 it is the W₀ that changes are measured from and compared with.
        first = step == 0 and any(pair.start is not None for pair in pairs)
        merged = census and ("merged_norm" in self.want or first)
        products = product_squares(pairs, merged, self._processes, dense=census)
        known = self.buffer.measured(step, "delta_norm")
        products.deltas = [
            None if i in known or "delta_norm" not in self.want else delta
            for i, delta in zip(ids.tolist(), products.deltas, strict=True)
        ]
        for column in sorted(self.measures):
            places, values = products.measured(column)
            if places:
                self.buffer.add(step, column, ids[places], values)


class BaseDeltas(Part):
    """‖W − W₀‖² of every tensor of the model, W₀ read again from its checkpoint."""

    measures = frozenset({"delta_norm"})

    def __init__(
        self, want: frozenset[str], table: TensorTable, buffer: MetricBuffer, model: nn.Module
    ) -> None:
        super().__init__(want, table, buffer)
        self._model = model
        self._base: BaseWeights | None = BaseWeights(model)

    def take_up(self, name: str | None) -> None:
        """Measure from the W₀ of a run that goes on, see `base_of_run`; None measures nothing."""
        self._base = None if name is None else BaseWeights(self._model, name)

    def census(self, step: int) -> None:
        """Measure all tensors."""
        found = self._base.deltas(self.table) if self._base is not None else []
        if found:
            ids = np.array([i for i, _ in found], dtype=np.int64)
            self.buffer.add(step, "delta_norm", ids, stacked([s for _, s in found]))


def _pairs(model: nn.Module, table: TensorTable) -> list[LoraPair]:
    measured = {i for i, _ in table.tensors}
    return [
        pair
        for pair in find_lora_pairs(model)
        if table.ids.get(pair.name_b) in measured
        and local_slices(pair.a) is not None
        and local_slices(pair.b) is not None
    ]
