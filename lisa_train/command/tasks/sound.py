"""Sound files -> samples, and folders of them with the words that were said."""

import csv
import io
import json
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.starting import reason_of

if TYPE_CHECKING:
    from datasets import DatasetDict

_LISTS = ("metadata.csv", "metadata.jsonl")
_SPLITS = ("train", "test", "validation")


def read_sound(value: Any, folder: Path, rate: int) -> NDArray[np.float32]:
    """Read a sound as samples in [-1, 1], its channels averaged.

    Parameters
    ----------
    value
        A path, `{"path": …, "bytes": …}`, or `{"array": …, "sampling_rate": …}`.
    folder
        What a path is relative to.
    rate
        Samples a second that the model expects.

    Raises
    ------
    ConfigError
        When it cannot be read, is silent for want of samples, or has another rate.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        samples, found = np.asarray(value["array"], np.float32), value.get("sampling_rate")
    else:
        samples, found = _from_file(value, folder)
    if not samples.size:
        raise ConfigError("the sound has no samples.")
    if found != rate:
        raise ConfigError(
            f"the sound has {found} samples a second and the model expects {rate}; convert the "
            f"files, as with `sox in.wav -r {rate} out.wav`."
        )
    return samples.mean(axis=-1) if samples.ndim > 1 else samples


def _from_file(value: Any, folder: Path) -> tuple[NDArray[np.float32], int]:
    held = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    if held is None and (not isinstance(path, str) or not path):
        raise ConfigError(f"{str(value)[:80]!r} is no sound; expected one, or the path of a file.")
    name = "a sound within the data" if held is not None else str(folder / str(path))
    source: Any = io.BytesIO(held) if held is not None else folder / str(path)
    try:
        return _wave(source)
    except (wave.Error, EOFError) as error:
        reason = reason_of(error)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror or error}).") from None
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError(
            f"{name} is no WAV file of whole numbers ({reason}); convert it, or install soundfile."
        ) from None
    source = io.BytesIO(held) if held is not None else source
    try:
        samples, rate = soundfile.read(source, dtype="float32")
    except Exception as error:
        raise ConfigError(f"{name} cannot be read as sound ({reason_of(error)}).") from error
    return samples, int(rate)


def _wave(source: Any) -> tuple[NDArray[np.float32], int]:
    """Samples of a WAV file of 8, 16, 24 or 32 bits."""
    with wave.open(source if not isinstance(source, Path) else str(source), "rb") as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
        rate = file.getframerate()
    if width == 1:  # without a sign, as WAV has it
        samples = raw.astype(np.float32) / 128 - 1
    else:
        # The highest bytes of a 32-bit number, whatever the width.
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = raw[: len(wide) * width].reshape(-1, width)
        samples = wide.view("<i4").ravel().astype(np.float64) / 2**31
    return samples.astype(np.float32).reshape(-1, channels), rate


def listed_folder(path: Path, train: str) -> "DatasetDict | None":
    """Read a folder of sounds with metadata.csv or .jsonl (`file_name`, and the text), or None.

    The layout of `datasets`' audiofolder: the list lies in the folder, or in one for each split.
    """
    from datasets import Dataset, DatasetDict

    found = {}
    for split, home in ((train, path), *((name, path / name) for name in _SPLITS)):
        for name in _LISTS:
            if (home / name).is_file():
                rows = _rows(home / name)
                for number, row in enumerate(rows, 1):
                    if not row.get("file_name"):
                        raise ConfigError(
                            f"row {number} of {home / name} has no file_name; expected the path of "
                            "a sound, relative to the list."
                        )
                    row["audio"] = str((home / row.pop("file_name")).resolve())
                if "text" not in rows[0] and "transcription" in rows[0]:
                    rows = [{**row, "text": row["transcription"]} for row in rows]
                found[split] = Dataset.from_list(rows)
    return DatasetDict(found) if found else None


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = [dict(row) for row in csv.DictReader(io.StringIO(text))]
        else:
            rows = [dict(json.loads(line)) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from None
    if not rows:
        raise ConfigError(f"{path} lists no sound; expected a row for each file.")
    return rows
