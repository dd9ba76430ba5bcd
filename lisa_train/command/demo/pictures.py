"""Small pictures of ten classes, as Parquet: Fashion-MNIST, or the digits of scikit-learn."""

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.sources import DIGITS, FASHION, converted, fetch, fetch_debian

if TYPE_CHECKING:
    import numpy as np

NAMES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
TRAINED, HELD_OUT = 9600, 2000  # images of Fashion-MNIST that are taken, from the start
HELD_OUT_EVERY = 4  # images of the digits


def pictures_folder() -> Path:
    """Return a folder with train.parquet and test.parquet, writing it on first use.

    Where Fashion-MNIST cannot be had (it is fetched as Debian's package), the digits are taken,
    and that is said.

    Raises
    ------
    LisaError
        When neither can be had.
    """
    try:
        return converted("fashion-mnist", _fashion)
    except LisaError as error:
        print(f"{error}\nGoing on with handwritten digits instead.", flush=True)
        return converted("digits", _digits)


def _fashion(folder: Path) -> None:
    home = fetch_debian(FASHION)
    for split, file, count in (("train", "train", TRAINED), ("test", "t10k", HELD_OUT)):
        images = read_idx(home / f"{file}-images-idx3-ubyte.gz")[:count]
        labels = read_idx(home / f"{file}-labels-idx1-ubyte.gz")[:count]
        write(folder / f"{split}.parquet", images, [NAMES[n] for n in labels])


def _digits(folder: Path) -> None:
    import numpy as np

    with gzip.open(fetch(DIGITS), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    images = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = [str(int(n)) for n in table[:, 64]]
    held_out = np.arange(len(table)) % HELD_OUT_EVERY == 0
    for split, chosen in (("train", ~held_out), ("test", held_out)):
        write(
            folder / f"{split}.parquet",
            images[chosen],
            [label for label, taken in zip(labels, chosen, strict=True) if taken],
        )


def read_idx(file: Path) -> "np.ndarray":
    """Return the numbers of a packed IDX file of bytes (LeCun's format), in its shape.

    Raises
    ------
    LisaError
        When the file is of another format.
    """
    import numpy as np

    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise LisaError(f"{file} is not an IDX file of bytes.")
    shape = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def write(path: Path, images: "np.ndarray", labels: Sequence[str]) -> None:
    """Write grey images and their labels as a Parquet file that `datasets` knows as images."""
    from datasets import ClassLabel, Dataset, Features, Image

    names = sorted(set(labels))
    rows = {"image": list(_packed(images)), "label": [names.index(label) for label in labels]}
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    Dataset.from_dict(rows, features=features).to_parquet(path)


def _packed(images: "np.ndarray") -> Iterator[dict[str, object]]:
    from PIL import Image

    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        yield {"bytes": file.getvalue(), "path": None}
