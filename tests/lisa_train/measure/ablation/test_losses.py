"""Losses of single examples: the rule that fits a model, the examples that are taken, batches."""

import numpy as np
import pytest
import torch
from helpers_ablating import build, by_hand, rows_of, stack
from torch import nn

from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.ablation.losses import ExampleLosses, Rows, _sums, choose_examples
from lisa_train.measure.ablation.summary import Effect, UnitEffects, effect
from lisa_train.measure.ablation.units import AblatedUnit

RULES = {
    "llama": "next", "gpt2": "next", "mixtral": "next", "bert": "same", "t5": "same",
    "whisper": "same", "bert_classifier": "class", "vit": "class", "llama_reward": "own",
    "wav2vec2": "own",
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_the_model_s_own(name):
    model, rows = build(name), rows_of(name)
    losses = ExampleLosses(model, rows)
    assert losses.rule == RULES[name]
    examples = choose_examples(losses, rows, None, 40)
    found = np.empty(len(rows.rows))
    with torch.no_grad():
        for batch in examples.batches:
            found[list(batch.examples)] = losses(model, batch.inputs)
    np.testing.assert_allclose(found, by_hand(model, rows), rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "whisper", "llama"])
def test_the_rule_of_a_model_whose_logits_hardly_depend_on_the_place(name):
    """As after a few steps at a high rate: the loss by the neighbour's label comes near as well."""
    model, rows = build(name), rows_of(name)
    for row in rows.rows:
        row["labels"] = torch.full_like(row["input_ids" if name != "whisper" else "labels"], 7)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    batch = rows.collate(rows.rows[:2])
    with torch.no_grad():
        output = model(**batch)
    sums = [_sums(output.logits, batch["labels"], rule).sum() for rule in ("next", "same")]
    means = [float(total / n) for total, n in zip(sums, (14, 16), strict=True)]
    assert means[0] == pytest.approx(means[1], rel=5e-4)
    assert means[0] != means[1]
    assert ExampleLosses(model, rows).rule == RULES[name]


def rows_seen(model, losses, batch):
    """How many positions the output head makes logits of."""
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output[..., 0].numel())
    )
    with torch.no_grad():
        found = losses(model, batch)
    hook.remove()
    return seen, found


@pytest.mark.parametrize(("name", "shift"), [("llama", 1), ("gpt2", 1), ("bert", 0)])
def test_the_head_makes_logits_only_of_what_counts(name, shift):
    """As in chat data, of which the answer alone counts."""
    model, rows = build(name), rows_of(name)
    for number, row in enumerate(rows.rows):
        row["labels"][: 3 + number % 2] = -100
    losses = ExampleLosses(model, rows)
    batch = rows.collate(rows.rows)
    seen, found = rows_seen(model, losses, batch)
    assert seen == [int(batch["labels"][:, shift:].ne(-100).sum())]
    assert seen[0] < batch["labels"].numel() - len(rows.rows)
    np.testing.assert_allclose(found, by_hand(model, rows), rtol=1e-5)


def test_a_model_whose_code_counts_positions_gets_them_all(monkeypatch):
    model, rows = build("llama"), rows_of("llama")
    original = model.forward

    def counting(input_ids=None, **inputs):
        output = original(input_ids=input_ids, **inputs)
        output.logits = output.logits + torch.zeros(input_ids.shape)[..., None]
        return output

    monkeypatch.setattr(model, "forward", counting)
    losses, batch = ExampleLosses(model, rows), rows.collate(rows.rows)
    seen, found = rows_seen(model, losses, batch)
    assert seen == [batch["labels"].numel()]
    np.testing.assert_allclose(found, by_hand(model, rows), rtol=1e-5)


def test_examples_are_spread_and_those_without_labels_left_out():
    rows = rows_of("llama", copies=6)
    for number in (3, 8):
        rows.rows[number]["labels"][:] = -100
    losses = ExampleLosses(build("llama"), rows)
    few = choose_examples(losses, rows, 4, 24)
    assert few.measured.about["examples"] == 3  # one of every three, and one has no label
    assert few.measured.about["available"] == 12
    every = choose_examples(losses, rows, None, 24)
    numbers = [n for batch in every.batches for n in batch.examples]
    assert sorted(numbers) == list(range(10))
    assert max(len(batch.examples) for batch in every.batches) == 3
    assert few.measured.about["digest"] != every.measured.about["digest"]
    again = choose_examples(losses, rows, 4, 8)
    assert few.measured.about["digest"] == again.measured.about["digest"]


def test_of_rows_that_come_in_turns_all_kinds_are_taken():
    """Every second of rows of two kinds would be of one kind."""
    rows = rows_of("llama", copies=40)
    losses = ExampleLosses(build("llama"), rows)
    for number, row in enumerate(rows.rows):
        row["input_ids"] = torch.full_like(row["input_ids"], number % 2)
        row["labels"] = row["input_ids"].clone()
    taken = choose_examples(losses, rows, len(rows.rows) // 2, 10_000).batches
    kinds = torch.cat([batch.inputs["input_ids"][:, 0] for batch in taken])
    assert len(kinds) == len(rows.rows) // 2
    assert 0.25 < kinds.double().mean() < 0.75


def test_unequal_examples_share_no_batch_unless_they_are_padded():
    row = rows_of("llama").rows[0]
    short = {k: v[:5] for k, v in row.items()}
    rows = Rows("x", [row, short, row, short, short], stack, 5, padded=False)
    losses = ExampleLosses(build("llama"), rows)
    examples = choose_examples(losses, rows, None, 100)
    assert sorted(batch.examples for batch in examples.batches) == [(0, 2), (1, 3, 4)]


def test_without_labels_or_loss():
    rows = rows_of("llama")
    bare = Rows("bare", [{"input_ids": rows.rows[0]["input_ids"]}], stack, 1)
    with pytest.raises(LisaError, match="examples of bare have no `labels`, only input_ids"):
        ExampleLosses(build("llama"), bare)
    masked = Rows("masked", [{k: v * 0 - 100 if k == "labels" else v for k, v in r.items()}
                             for r in rows.rows], stack, 6)  # fmt: skip
    losses = ExampleLosses(build("llama"), rows)
    with pytest.raises(LisaError, match="none of 6 examples of masked has a label"):
        choose_examples(losses, masked, None, 40)

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, labels):
            return {"logits": torch.zeros(*input_ids.shape, 4)}

    with pytest.raises(LisaError, match="Silent gives no loss"):
        ExampleLosses(Silent(), rows)


@pytest.mark.parametrize(
    ("reset", "forgetting", "proposed"),
    [
        ((0.0, 0.1), (0.3, 0.1), True),  # -0.1 … 0.1 against 0.2 … 0.4
        ((0.0, 0.3), (0.3, 0.1), False),  # it may help as much: too few examples
        ((0.0, 0.1), (0.05, 0.1), False),  # it may cost nothing
        ((0.05, 0.01), (0.3, 0.1), False),  # it surely helps
        ((-0.5, 0.1), (-0.1, 0.05), False),  # it does harm here, and helps there
        ((float("nan"), 0.1), (0.3, 0.1), False),
    ],
)
def test_what_is_proposed_to_put_back(reset, forgetting, proposed):
    unit = AblatedUnit("3", None, ())
    found = UnitEffects(unit, Effect(*reset), Effect(0.1, 0.1), Effect(*forgetting))
    assert found.costs_without_gain == proposed
    assert not UnitEffects(unit, Effect(*reset), Effect(0.1, 0.1), None).costs_without_gain


def test_intervals_against_a_bootstrap():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, 80)
    before = 3.0 * tokens + generator.standard_normal(80) * np.sqrt(tokens)
    after = before + 0.05 * tokens + 0.4 * generator.standard_normal(80) * np.sqrt(tokens)
    found = effect(after, before, tokens)
    assert found.value == pytest.approx((after - before).sum() / tokens.sum())
    picks = generator.integers(0, 80, (4000, 80))
    resampled = (after - before)[picks].sum(1) / tokens[picks].sum(1)
    assert found.margin == pytest.approx(1.96 * resampled.std(), rel=0.08)
    assert np.isnan(effect(after[:1], before[:1], tokens[:1]).margin)
