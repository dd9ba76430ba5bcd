"""DINOv2-small from an ONNX file to an ordinary Hugging Face folder (fp32, as in the file)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.onnx_file import read_onnx
from lisa_train.command.demo.sources import DINOV2, converted, fetch

if TYPE_CHECKING:
    import numpy as np

SIDE = 56  # pixels of an image: 4 × 4 patches of 14
# Name in the file -> name below `encoder.layer.N`
_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def dinov2_folder() -> Path:
    """Return the folder of the converted model, converting it on first use."""
    return converted("dinov2-small", lambda folder: convert(fetch(DINOV2), folder))


def convert(onnx_file: Path, folder: Path, heads: int = 6) -> None:
    """Write the backbone and an image processor with `save_pretrained`.

    The file keeps biases, norms and scales by their names; the matrices of linear maps have lost
    theirs and are transposed: they are told by the operator that multiplies by them. The mask token
    of the pretraining is not in the file, and is zero.

    Raises
    ------
    LisaError
        When the file has another layout.
    """
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    weights = backbone(onnx_file)
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer."))
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    positions = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=patch * round(positions**0.5),
    )  # fmt: skip
    model = Dinov2Model(config)
    tensors: dict[str, Any] = {n: torch.from_numpy(a.copy()) for n, a in weights.items()}
    tensors["embeddings.mask_token"] = torch.zeros(1, width)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise LisaError(f"{onnx_file} is not a DINOv2 of the expected layout: {error}") from error
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    BitImageProcessorPil(
        size=size, do_center_crop=False, do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip


def backbone(onnx_file: Path) -> Mapping[str, "np.ndarray"]:
    """Return the weights of the backbone by the names that `Dinov2Model` has for them."""
    import numpy as np

    nodes, constants = read_onnx(onnx_file)
    prefix = "backbone."
    found = {n.removeprefix(prefix): a for n, a in constants.items() if n.startswith(prefix)}
    for node in nodes:
        matrix = next((constants[n] for n in node.inputs if n in constants), None)
        if matrix is None or not node.name.startswith("/backbone/"):
            continue
        if node.operator == "MatMul":
            linear = ".".join(node.name.split("/")[2:-1])
            found[f"{linear}.weight"] = matrix.T
        elif node.operator == "Reshape" and matrix.ndim == 3 and matrix.dtype == np.float32:
            found["positions of patches"] = matrix
        elif node.operator == "Concat" and matrix.ndim == 3:
            found["position of class"] = matrix
    try:
        pair = [found.pop("position of class"), found.pop("positions of patches")]
    except KeyError as error:
        raise LisaError(f"{onnx_file} is not a DINOv2: it has no {error.args[0]}.") from error
    found["embeddings.position_embeddings"] = np.concatenate(pair, axis=1)
    return {_renamed(name): array for name, array in found.items()}


def _renamed(name: str) -> str:
    for old, new in _PARTS.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
