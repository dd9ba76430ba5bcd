"""Whisper tiny.en from a CTranslate2 file to a Hugging Face folder (fp16 read as fp32)."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.sources import WHISPER, converted, fetch_folder

if TYPE_CHECKING:
    import numpy as np
    from transformers import WhisperConfig

SECONDS = 6  # of a sound: a tenth of the cost of Whisper's thirty
_DTYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
# Name in the file, below `layer_N` -> name below `layers.N`; where several stand side by side in
# one tensor of the file, all of them.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OUTSIDE = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/layer_norm": "decoder.layer_norm",
    "decoder/embeddings": "decoder.embed_tokens",
    "encoder/position_encodings": "encoder.embed_positions",
    "decoder/position_encodings": "decoder.embed_positions",
}
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def whisper_folder() -> Path:
    """Return the folder of the converted model, converting it on first use."""
    return converted("whisper-tiny.en", lambda folder: convert(fetch_folder(WHISPER), folder))


def convert(source: Path, folder: Path, seconds: int = SECONDS) -> None:
    """Write model, feature extractor and tokenizer with `save_pretrained`.

    Raises
    ------
    LisaError
        When the files have another layout.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    values = read_ctranslate2(source / "model.bin")
    weights = whisper_weights(values)
    given = json.loads((source / "config.json").read_text())
    tokens = {
        t["content"]: t["id"]
        for t in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    }
    positions = 50 * seconds
    weights["model.encoder.embed_positions.weight"] = weights[
        "model.encoder.embed_positions.weight"
    ][:positions]
    start, end = tokens["<|startoftranscript|>"], tokens["<|endoftext|>"]
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end,
           "pad_token_id": end}  # fmt: skip
    config = _config(values, weights, ids)
    model = WhisperForConditionalGeneration(config)
    tensors: dict[str, Any] = {n: torch.from_numpy(a.astype("float32")) for n, a in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise LisaError(f"{source} is not a Whisper of the expected layout: {missing}{unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        max_length=config.max_target_positions, return_timestamps=False, is_multilingual=False,
        no_timestamps_token_id=tokens["<|notimestamps|>"], suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
        alignment_heads=given["alignment_heads"], **ids,
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds).save_pretrained(
        folder
    )
    WhisperTokenizer.from_pretrained(source).save_pretrained(folder)


def _config(
    values: Mapping[str, "np.ndarray"], weights: Mapping[str, "np.ndarray"], ids: Mapping[str, int]
) -> "WhisperConfig":
    """Settings of the model, as its tensors show them."""
    from transformers import WhisperConfig

    counts = {
        side: len({n.split("/")[1] for n in values if n.startswith(f"{side}/layer_") and
                   n.split("/")[1] != "layer_norm"})
        for side in ("encoder", "decoder")
    }  # fmt: skip
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    return WhisperConfig(
        vocab_size=vocabulary, d_model=width,
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        encoder_layers=counts["encoder"], decoder_layers=counts["decoder"],
        encoder_attention_heads=int(values["encoder/num_heads"]),
        decoder_attention_heads=int(values["decoder/num_heads"]),
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, **ids,
    )  # fmt: skip


def read_ctranslate2(file: Path) -> dict[str, "np.ndarray"]:
    """Return the tensors of a CTranslate2 file (version 6) by their names.

    Raises
    ------
    LisaError
        When the file is of another format or version.
    """
    import numpy as np

    found: dict[str, np.ndarray] = {}
    try:
        with file.open("rb") as stream:
            version = _number(stream, "I")
            if version != 6:
                raise LisaError(f"{file} is of version {version} of CTranslate2's format, not 6.")
            _text(stream)  # the kind of model
            _number(stream, "I")  # revision of its specification
            for _ in range(_number(stream, "I")):
                name = _text(stream)
                shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
                dtype = _DTYPES[_number(stream, "B")]
                content = stream.read(_number(stream, "I"))
                found[name] = np.frombuffer(content, dtype).reshape(shape)
    except (struct.error, ValueError, IndexError) as error:
        raise LisaError(f"{file} is not a file of CTranslate2 ({error}).") from error
    return found


def whisper_weights(values: Mapping[str, "np.ndarray"]) -> dict[str, "np.ndarray"]:
    """Return tensors of the file by the names of `WhisperForConditionalGeneration`."""
    import numpy as np

    weights: dict[str, np.ndarray] = {}
    for name, array in values.items():
        stem, _, leaf = name.rpartition("/")
        leaf = _LEAVES.get(leaf, leaf)
        layer = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(.+)", stem)
        if stem in _OUTSIDE:
            weights[f"model.{_OUTSIDE[stem]}.{leaf}"] = array
        elif layer and layer[3] in _PARTS and array.ndim:
            parts = _PARTS[layer[3]]
            for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
                if part.endswith("k_proj") and leaf == "bias":
                    continue  # Whisper's keys have none; the file fills it with zeros
                weights[f"model.{layer[1]}.layers.{layer[2]}.{part}.{leaf}"] = piece
    return weights


def _number(stream: BinaryIO, kind: str) -> int:
    return int(struct.unpack("<" + kind, stream.read(struct.calcsize("<" + kind)))[0])


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "H")).rstrip(b"\0").decode()
