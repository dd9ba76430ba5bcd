"""Stored tensors: every float type against torch, shards, scales of 8-bit weights, damage."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.rundir.weights.checkpoint import find_layers, open_checkpoint
from lisa_analysis.rundir.weights.spectra import singular_values
from lisa_analysis.rundir.weights.stored import decoded, pieces, read_header, square_sum

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_all_256_values_of_an_8_bit_float_are_torchs(name):
    bytes_ = torch.arange(256, dtype=torch.uint8)
    expected = bytes_.view(TYPES[name]).to(torch.float64).numpy()
    np.testing.assert_array_equal(decoded(bytes_.numpy(), name), expected)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_all_values_of_a_16_bit_float_are_torchs(name):
    bits = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(TYPES[name]).to(torch.float64).numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(decoded(bits, name), expected)


@pytest.mark.parametrize("name", [*TYPES])
def test_numbers_come_back_a_piece_at_a_time(tmp_path, name):
    weight = torch.randn(37, 19).to(TYPES[name])
    save_file({"a": torch.ones(3), "w": weight}, tmp_path / "m.safetensors")
    stored = read_header(tmp_path / "m.safetensors")["w"]
    assert (stored.dtype, stored.shape) == (name, (37, 19))
    [matrix] = stored.matrices()
    found = np.concatenate(list(pieces(matrix, piece=100)))
    expected = weight.to(torch.float64).numpy()
    np.testing.assert_array_equal(found, expected)
    assert square_sum(matrix, piece=100) == pytest.approx((expected**2).sum())


@pytest.mark.parametrize("shape", [(40, 13), (13, 40), (20, 20), (1, 5), (5, 1)])
def test_singular_values_are_those_of_a_whole_decomposition(tmp_path, shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    save_file({"w": weight}, tmp_path / "m.safetensors")
    [matrix] = read_header(tmp_path / "m.safetensors")["w"].matrices()
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix, piece=60), expected, atol=1e-7)


def test_fused_experts_are_a_matrix_each(tmp_path):
    weight = torch.randn(3, 4, 5)
    save_file({"layers.0.mlp.experts.down_proj": weight}, tmp_path / "m.safetensors")
    [stored] = read_header(tmp_path / "m.safetensors").values()
    found = [matrix.read(0, 4) for matrix in stored.matrices()]
    np.testing.assert_array_equal(found, weight.double().numpy())


def test_shards_are_read_as_one_model(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert {*open_checkpoint(tmp_path)} == {"a", "b"}
    (tmp_path / names["b"]).unlink()
    with pytest.raises(LisaError, match="lacks model-00002-of-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", ["whole", "rows", "blocks"])
def test_8_bit_weights_are_read_with_their_factors(tmp_path, layout):
    weight = torch.randn(6, 10).to(torch.float8_e4m3fn)
    shape = {"whole": (), "rows": (6, 1), "blocks": (2, 3)}[layout]
    name = "w.weight_scale" if layout == "rows" else "w.weight_scale_inv"
    scale = torch.rand(shape) + 0.5
    save_file({"w.weight": weight, name: scale}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"weight_block_size": [4, 4]}} if layout == "blocks" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    full = torch.ones(6, 10)
    for i in range(6):
        for j in range(10):
            full[i, j] = scale[i // 4, j // 4] if layout == "blocks" else (
                scale[i, 0] if layout == "rows" else scale)  # fmt: skip
    tensors = open_checkpoint(tmp_path)
    assert {*tensors} == {"w.weight"}
    [matrix] = tensors["w.weight"].matrices()
    expected = weight.double() * full.double()
    np.testing.assert_allclose(np.concatenate(list(pieces(matrix, 15))), expected.numpy())


def test_layers_are_found_by_name():
    llama = [f"model.layers.{i}.mlp.{k}_proj.weight" for i in (0, 1, 10) for k in ("up", "down")]
    found = find_layers([*llama, "model.embed_tokens.weight"], llama)
    assert found == [f"model.layers.{i}" for i in range(11)]
    t5 = [f"{s}.block.{i}.layer.0.SelfAttention.{k}.weight" for s in ("encoder", "decoder")
          for i in range(2) for k in "qk"]  # fmt: skip
    assert find_layers(t5, t5) == [
        "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"
    ]  # fmt: skip
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in (0, 1)]
    assert find_layers(experts, experts) == ["model.layers.0", "model.layers.1"]


def test_damage_is_a_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(50)}, path)
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    for content, words in (
        (b"", "its header would be"),
        (struct.pack("<Q", 1 << 40) + whole[8:], "its header would be"),
        (whole[:8] + b"x" * size + whole[8 + size :], "no JSON"),
        (whole[:-20], "does not fit"),
    ):
        path.write_bytes(content)
        with pytest.raises(LisaError, match=words):
            open_checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(LisaError, match="holds no safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LisaError, match="only torch reads"):
        open_checkpoint(tmp_path)
    with pytest.raises(LisaError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    save_file({"w.qweight": torch.ones(4, dtype=torch.int32)}, path)
    with pytest.raises(LisaError, match="packed weights"):
        open_checkpoint(tmp_path)
