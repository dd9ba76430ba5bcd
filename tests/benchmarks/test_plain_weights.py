"""Two checkpoints with tensors of an 8B model, streamed: memory far below that of the weights."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark

# Llama-3.1-8B, but two of its 32 layers: memory is that of a tensor's piece, not of the model.
HIDDEN, WIDE, KEYS, VOCABULARY, LAYERS = 4096, 14336, 1024, 128256, 2
MOST = 2 * 10**9

# VmHWM and not ru_maxrss, in which a process begins with the size of the one that started it.
COMPARE = """
import json, re, sys
import lisa_analysis as la
peak = lambda: 1024 * int(re.search("VmHWM:[^0-9]+([0-9]+)", open("/proc/self/status").read())[1])
from lisa_analysis.rundir.weights.spectra import singular_values
weights = la.load(sys.argv[1], base=sys.argv[2])
scores = la.importance(weights, "delta_norm").scores.tolist()
streamed = peak()
[matrix] = next(c for c in weights.changed if c.name.endswith("0.mlp.down_proj.weight")).change
top = float(singular_values(matrix)[0])
spectrum = peak()
print(json.dumps([scores, streamed, top, spectrum, "torch" in sys.modules]))
"""


def write_sparse(path: Path, value: int) -> int:
    """A model in bfloat16 that is zero but for the first number of every tensor; its bytes."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)), ("self_attn.k_proj", (KEYS, HIDDEN)),
            ("self_attn.v_proj", (KEYS, HIDDEN)), ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (WIDE, HIDDEN)), ("mlp.up_proj", (WIDE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, WIDE)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.mkdir()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + at)
        for entry in header.values():
            file.seek(start + entry["data_offsets"][0])
            file.write(struct.pack("<H", value))
    return at


def test_memory_is_that_of_pieces(tmp_path: Path) -> None:
    size = write_sparse(tmp_path / "base", 0)
    write_sparse(tmp_path / "tuned", 0x3F80)  # 1.0
    assert size > 1.9e9
    command = [sys.executable, "-c", COMPARE, str(tmp_path / "tuned"), str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores, streamed, top, spectrum, torch = json.loads(done.stdout)
    assert scores == pytest.approx([math.sqrt(7)] * LAYERS)
    assert top == pytest.approx(1)
    assert not torch
    print(f"{size / 1e9:.1f} GB twice: {streamed / 1e6:.0f} MB; spectrum: {spectrum / 1e6:.0f} MB")
    assert streamed < MOST / 2
    assert spectrum < MOST
