"""What an ablation costs, as a ratio to whole passes over the same examples in the same process."""

import time

import pytest
import torch
from helpers_ablating import change_of, perturb, prepared, stack
from transformers import LlamaConfig, LlamaForCausalLM

from lisa_train.measure.ablation.ablating import ablate_units
from lisa_train.measure.ablation.file import AblationFile
from lisa_train.measure.ablation.losses import Rows
from lisa_train.measure.ablation.units import make_units

pytestmark = pytest.mark.benchmark
LAYERS = 12


@pytest.fixture(autouse=True)
def one_thread():
    """Processor time counts the waiting of threads for each other, which varies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("reuse", "most"), [(False, 1.1), (True, 0.75)])
def test_cost_in_whole_passes(tmp_path, reuse, most):
    """At most 1.1 of (2 · units + 2) whole passes; with reuse about half of the layers' part."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    perturb(model, 0.01).save_pretrained(tmp_path / "final")
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.randint(0, 512, (24, 64))
    rows = Rows("ids", [{"input_ids": r, "labels": r.clone()} for r in ids], stack, len(ids))
    change = change_of(trained, tmp_path)
    losses, examples = prepared(trained, rows, tokens=512)
    units = make_units(change.parts, change.kinds)
    assert len(units) == LAYERS + 3  # embed, head, norm

    def whole():
        began = time.process_time()
        with torch.no_grad():
            for batch in examples.batches:
                losses(trained, batch.inputs)
        return time.process_time() - began

    passes = [whole() for _ in range(4)][1:]
    began = time.process_time()
    file = AblationFile(tmp_path, {}, {"held_out": examples.measured})
    cost = ablate_units(
        change, losses, {"held_out": examples}, units, file, reuse=reuse, progress=False
    )
    taken = time.process_time() - began
    passes += [whole() for _ in range(3)]
    naive = (2 * len(units) + 2) * sorted(passes)[len(passes) // 2]
    print(f"reuse {reuse}: {taken / naive:.2f} of the naive time, {cost.passes:.1f} passes")
    assert taken <= most * naive
