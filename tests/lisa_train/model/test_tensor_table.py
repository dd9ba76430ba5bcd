"""The tensor table reads a model; putting FSDP2's shards back is a step of its own."""

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
