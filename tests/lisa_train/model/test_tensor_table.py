"""The tensor table reads a model; putting FSDP2's shards back is a step of its own."""

import json
from types import SimpleNamespace

import bitsandbytes
import pandas as pd
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.contract.schema import MANIFEST
from lisa_train.measure.disk.run_file import begun, continued
from lisa_train.model.layer_map import find_layers
from lisa_train.model.tensor_table import TensorTable, number_tensors


def test_only_the_function_that_says_so_reshards(make_llama):
    model = make_llama(layers=2)
    calls = []
    layer = model.model.layers[0]
    layer._get_fsdp_state = lambda: None
    layer.reshard = lambda: calls.append("reshard")
    layer_map = find_layers(model)
    read = TensorTable(model, layer_map, None)
    assert calls == []
    assert number_tensors(model, layer_map, None).rows == read.rows
    assert calls == ["reshard"]


class TestPackedWeights:
    """QLoRA's weights have two elements of 4 bits in a byte, in a column."""

    @pytest.fixture
    def rows(self, make_llama):
        model = make_llama(layers=3)
        whole = TensorTable(model, find_layers(model), None).rows
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if hasattr(module, "weight"):
                        packed = bitsandbytes.nn.Linear4bit(
                            module.in_features, module.out_features, bias=False, quant_type="nf4"
                        )
                        packed.weight = bitsandbytes.nn.Params4bit(
                            module.weight.data, requires_grad=False, quant_type="nf4"
                        )
                        setattr(part, name, packed.to("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.shape[1] == 1
        return whole, TensorTable(model, find_layers(model), None).rows

    def test_have_the_shape_that_they_had(self, rows):
        whole, packed = rows
        for column in ("name", "shape", "numel"):
            assert [row[column] for row in packed] == [row[column] for row in whole]
        assert any(row["dtype"] == "uint8" for row in packed)

    def test_get_the_ranks_of_the_whole_model(self, rows):
        names = [f"model.layers.{layer}" for layer in range(3)]
        profile = la.ImportanceProfile.from_scores([1, 2, 4], names=names)
        settings = {"r": 4, "use_intervals": False, "strength": 2}

        def export(table):
            run = SimpleNamespace(
                parameters=pd.DataFrame(table), layer_names=tuple(names), run_id="r", manifest={}
            )
            return la.export(profile, "peft-rank", run=run, **settings)

        whole, packed = map(export, rows)
        assert packed.values == whole.values
        assert packed.statement == whole.statement
        assert len(set(whole.values["rank_pattern"].values())) > 1
        earlier = [
            row | ({"shape": f"{row['numel'] // 2}x1"} if row["dtype"] == "uint8" else {})
            for row in rows[1]
        ]
        with pytest.raises(LisaError, match="packed to 4 bits, without the shape"):
            export(earlier)
        # What needs no shapes is written all the same.
        run = SimpleNamespace(
            parameters=pd.DataFrame(earlier), layer_names=tuple(names), run_id="r", manifest={}
        )
        certain = {"layers": 2, "run": run, "use_intervals": False}
        assert "2 of 3 layers train" in la.export(profile, "freeze", **certain).statement
        made = la.export(profile, "peft-layers", **certain)
        assert made.values["layers_to_transform"] == [1, 2]
        assert "trained parameters" not in made.statement

    def test_a_run_that_listed_them_packed_goes_on(self, rows, tmp_path):
        packed = rows[1]
        earlier = [
            row | ({"shape": f"{row['numel'] // 2}x1"} if row["dtype"] == "uint8" else {})
            for row in packed
        ]
        layers = [
            {"index": i, "name": f"model.layers.{i}", "stack": "model.layers"} for i in range(3)
        ]
        entry = {"status": "interrupted", "method": "lora", "layers": layers}
        manifest = begun(tmp_path, {"layers": layers}, earlier, None)
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | entry), encoding="utf-8")
        continued(tmp_path, {}, packed)
        other = [row | {"shape": row["shape"].replace("x", "1x")} for row in packed]
        with pytest.raises(RunDirectoryError, match="was recorded from another model"):
            continued(tmp_path, {}, other)
