"""Losses of single examples: which are measured, in which batches, and what counts in them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.ablation.file import Measured
from lisa_train.model.module_tree import output_head, unwrap

IGNORED = -100
# next: a position is compared with the label of the one after it; same: with its own; class: one
# label an example; own: the model's own loss of one example at a time.
Rule = Literal["next", "same", "class", "own"]
_AGREES = 1e-3  # relative, of two sums of the same fp32 terms
_SAME = {False: 1e-5, True: 1e-2}  # relative, of products of another shape; in bf16: True

Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Rows:
    """Examples as a data set holds them.

    Attributes
    ----------
    name
        Of the data, in words.
    rows
        Mappings from the names of a model's inputs to numbers, `labels` among them.
    collate
        Makes a batch of some of them.
    available
        How many there are; `rows` may be fewer.
    padded
        Whether `collate` pads: without it only examples of equal shapes share a batch.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    collate: Collate
    available: int
    padded: bool = True


@dataclass(frozen=True)
class Batch:
    """Some examples, by their numbers, and what the model takes."""

    examples: tuple[int, ...]
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Examples:
    """The examples of one data that are measured: each has at least one label that counts.

    Attributes
    ----------
    measured
        What the file says of them.
    batches
        The examples in batches of about equal length.
    """

    measured: Measured
    batches: tuple[Batch, ...]


class ExampleLosses:
    """Sums a model's loss over the labels of every example.

    The sums are made from the logits where they then agree with the model's own loss on a batch,
    so that examples can share one; else from the model's own loss, one example at a time. The
    output head makes logits only of positions whose label counts, where that gives the same sums:
    with a large vocabulary the others cost up to a fifth of a pass.

    Parameters
    ----------
    model
        The model.
    rows
        Examples to try it on.
    bf16
        Compute in that precision by autocast.

    Raises
    ------
    LisaError
        When the examples have no labels, or the model makes no loss of them.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, bf16: bool = False) -> None:
        bare: Any = unwrap(model)
        config = getattr(bare, "config", None)
        # It makes the decoder's inputs of the labels.
        self._needs_labels = bool(getattr(config, "is_encoder_decoder", False))
        self._options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        self._device = next(model.parameters()).device
        self._bf16 = bf16
        count = 2 if rows.padded and len(rows.rows) > 1 else 1
        tried = [rows.rows[i] for i in range(count)]  # a data set's own slice is no list of rows
        batch = self.on_device(rows.collate(tried))
        if "labels" not in batch:
            raise LisaError(
                f"the examples of {rows.name} have no `labels`, only {', '.join(batch)}: there is "
                "no loss to measure."
            )
        self._few_positions = False
        self.rule: Rule = self._find_rule(model, batch, len(tried))
        if not self._needs_labels and self.rule in ("next", "same"):
            self._few_positions = self._tries_positions(model, batch)

    def _find_rule(self, model: nn.Module, batch: Mapping[str, Any], count: int) -> Rule:
        with torch.no_grad():
            output = self._forward(model, batch)
        own = _part(output, "loss")
        if own is None or own.numel() != 1:
            raise LisaError(
                f"{type(unwrap(model)).__name__} gives no loss for examples with labels: an "
                "ablation needs a model with the head that it was trained with."
            )
        logits, labels = _part(output, "logits"), batch["labels"]
        if not torch.is_tensor(logits) or labels.is_floating_point() or len(labels) != count:
            return "own"
        rules: tuple[Rule, ...] = ("next", "same") if labels.ndim == 2 else ("class",)
        # Where logits hardly differ by place two rules come near: the nearer one is the model's.
        found: list[tuple[float, Rule]] = []
        for rule in rules:
            if logits.shape[:-1] != labels.shape:
                continue
            sums, counts = _sums(logits, labels, rule), self.counts(labels, rule)
            mean = float(sums.sum() / counts.sum().clamp(min=1))
            distance = abs(mean - float(own))
            if distance <= _AGREES * max(abs(mean), 1e-3):
                found.append((distance, rule))
        return min(found)[1] if found else "own"

    def _tries_positions(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether a model that calls its head on some positions alone gives the same sums."""
        if output_head(unwrap(model)) is None:
            return False
        with torch.no_grad():
            whole = self(model, batch)
            try:
                some = self._of_positions(model, batch)
            except (RuntimeError, ValueError, IndexError, TypeError):  # its code counts positions
                return False
        return torch.allclose(some, whole, rtol=_SAME[self._bf16], atol=0)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of every example of a batch, float64 on the CPU."""
        labels = batch["labels"]
        if self.rule == "own":
            own = _part(self._forward(model, batch), "loss").double().reshape(1)
            return (own * self._own_count(labels)).cpu()
        given = batch if self._needs_labels else {k: v for k, v in batch.items() if k != "labels"}
        if self._few_positions:
            return self._of_positions(model, batch)
        return _sums(_part(self._forward(model, given), "logits"), labels, self.rule).cpu()

    def _of_positions(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The same, with logits of the positions alone whose label counts."""
        counts, wanted = _counted(batch["labels"], self.rule)
        given = {name: value for name, value in batch.items() if name != "labels"}
        with _few_positions(output_head(unwrap(model)), counts):
            logits = _part(self._forward(model, given), "logits")
        if logits.shape[:2] != (1, len(wanted)):
            raise ValueError("the output head was not called once, on every position")
        return _summed(logits[0], wanted, counts).cpu()

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return model(**inputs, **self._options)

    def counts(self, labels: torch.Tensor, rule: Rule | None = None) -> torch.Tensor:
        """Return how many labels count in every example."""
        rule = self.rule if rule is None else rule
        if rule == "own":
            return torch.tensor([self._own_count(labels)])
        if rule == "class":
            return labels.ne(IGNORED).long()
        return (labels[:, 1:] if rule == "next" else labels).ne(IGNORED).sum(1)

    def _own_count(self, labels: torch.Tensor) -> int:
        if labels.is_floating_point():
            return 1
        return int(labels.ne(IGNORED).sum()) if labels.ndim > 1 else 1

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors on the model's device."""
        return {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in batch.items()}


def choose_examples(
    losses: ExampleLosses, rows: Rows, most: int | None, tokens_a_batch: int
) -> Examples:
    """Take at most `most` of the rows, spread over them, and put them into batches.

    Of every stretch of equal length one is drawn, always the same one: rows that are sorted are
    covered, and of rows that come in turns (a class after the other) not one kind alone is taken.

    Parameters
    ----------
    losses
        How the model's losses are taken.
    rows
        The examples.
    most
        How many to take; None takes all.
    tokens_a_batch
        Positions of a batch, padding included; one example may be longer.

    Raises
    ------
    LisaError
        When no example has a label that counts.
    """
    count = len(rows.rows) if most is None else min(most, len(rows.rows))
    within = np.random.default_rng(0).random(count)
    numbers = [int((i + within[i]) * len(rows.rows) / count) for i in range(count)]
    taken = [rows.rows[i] for i in numbers]
    alone = [losses.on_device(rows.collate([row])) for row in taken]
    labels = [int(losses.counts(batch["labels"]).sum()) for batch in alone]
    there = [i for i, n in enumerate(labels) if n]
    if not there:
        raise LisaError(
            f"none of {len(taken)} examples of {rows.name} has a label that counts: there is no "
            "loss to measure."
        )
    single = [alone[i] for i in there]
    tokens = np.asarray([labels[i] for i in there], np.int32)
    groups = _grouped(single, tokens_a_batch, alone=losses.rule == "own", padded=rows.padded)
    batches = [
        Batch(group, losses.on_device(rows.collate([taken[there[i]] for i in group])))
        for group in groups
    ]
    about = {
        "name": rows.name,
        "examples": len(there),
        "available": rows.available,
        "tokens": int(tokens.sum()),
        "digest": _digest(single),
    }
    return Examples(Measured(about, tokens), tuple(batches))


def _grouped(
    rows: Sequence[Mapping[str, Any]], most: int, *, alone: bool, padded: bool
) -> list[tuple[int, ...]]:
    """Numbers of the examples of every batch: of about equal length, so that little is padding."""
    lengths = [_length(row) for row in rows]
    shapes = ["" if padded else _shapes(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], shapes[i], i))
    batches: list[list[int]] = []
    for i in order:
        first = batches[-1][0] if batches and not alone else None
        fits = first is not None and (len(batches[-1]) + 1) * lengths[first] <= most
        if first is not None and fits and shapes[i] == shapes[first]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [tuple(batch) for batch in batches]


def _shapes(row: Mapping[str, Any]) -> str:
    return str(sorted((name, tuple(np.shape(value))) for name, value in row.items()))


def _length(row: Mapping[str, Any]) -> int:
    """Positions of an example; without token ids a guess at a picture's or a sound's."""
    ids, labels = row.get("input_ids"), row.get("labels")
    if not isinstance(ids, torch.Tensor) or ids.ndim < 2:
        return 256
    length = int(ids.shape[1])
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and labels.shape != ids.shape:
        length += int(labels.shape[1])
    return length


def _sums(logits: torch.Tensor, labels: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Cross entropy of every example, summed over its labels in float64."""
    if rule == "class":
        return cross_entropy(logits.float(), labels, reduction="none").double()
    counts, wanted = _counted(labels, rule)
    return _summed(logits[counts], wanted, counts)


def _counted(labels: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions are compared with a label that counts, and these labels in their order."""
    counts = labels.ne(IGNORED)
    if rule == "next":
        counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
        return counts, labels[:, 1:][counts[:, :-1]]
    return counts, labels[counts]


def _summed(logits: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the positions that count, summed by example."""
    each = cross_entropy(logits.float(), wanted, reduction="none").double()
    sums = torch.zeros(len(counts), dtype=torch.float64, device=each.device)
    return sums.index_add_(0, counts.nonzero()[:, 0], each)


@contextmanager
def _few_positions(head: Any, counts: torch.Tensor) -> Iterator[None]:
    """Let the output head see these positions alone, as one row."""

    def some(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][counts].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(some)
    try:
        yield
    finally:
        hook.remove()


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Short hash of what is measured, example by example."""
    found = hashlib.sha256()
    for row in rows:
        for name, tensor in sorted(row.items()):
            if torch.is_tensor(tensor):
                values = tensor.cpu()
                whole = values.double() if values.is_floating_point() else values.long()
                found.update(f"{name}{tuple(values.shape)}".encode())
                found.update(whole.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
