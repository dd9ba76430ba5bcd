"""`task: image-classification`: one class per image."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import reason_of, refusals
from lisa_train.command.tasks.classes import Classes, TaskWithClasses
from lisa_train.command.tasks.plain_trainer import cannot_be_loaded
from lisa_train.command.tasks.splits import Part, place
from lisa_train.command.tasks.task import Loaded

if TYPE_CHECKING:
    from datasets import Dataset


class ImageClassification(TaskWithClasses):
    """One class per image."""

    name = "image-classification"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "image": "an image, or the path of its file",
        "label": "its class: a name or a number",
    }
    class_column = "label"
    needed = ("image", "label")

    def arrange(self, dataset: "Dataset", config: TrainConfig) -> "Dataset":
        """Leave images as they are in their files: they are read when a batch is made."""
        from datasets import Image

        if "image" in dataset.column_names and isinstance(dataset.features["image"], Image):
            return dataset.cast_column("image", Image(decode=False))
        return dataset

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and image processor; every image is opened once."""
        train, held_out = self.parts(config)
        classes = self.classes(train, held_out, config)
        for part in (train, held_out):
            if part is not None:
                _check_images(part, config)
        model, new = self.load_classifier(classes, config)
        from transformers import AutoImageProcessor

        with refusals(partial(cannot_be_loaded, "image processor", config)):
            processor = AutoImageProcessor.from_pretrained(
                config.model_name_or_path,
                revision=config.model_revision,
                trust_remote_code=config.trust_remote_code,
            )
        rows = [
            None if part is None else part.dataset.select_columns(list(self.needed))
            for part in (train, held_out)
        ]
        data = self.data(train, held_out, rows, config, classes.names)
        self._classes = classes
        return Loaded(model, processor, data, new, [*classes.said, *_empty_folders(config)])

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Read the images of a batch and give them to the processor."""
        return ImageBatch(loaded.processor, self._classes, folder_of(config))


@dataclass(frozen=True)
class ImageBatch:
    """Makes a batch of rows with an image and a label."""

    processor: Any
    classes: Classes
    folder: Path

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values` and `labels`."""
        import torch

        images = [read_image(row["image"], self.folder) for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = [self.classes.number[row["label"]] for row in rows]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}


def _empty_folders(config: TrainConfig) -> list[str]:
    """Say which folders of a class hold no image: what has none is no class of the data."""
    root = Path(config.dataset_name)
    if not root.is_dir():
        return []
    folders = [path for path in sorted(root.rglob("*")) if path.is_dir()]
    names = [path.relative_to(root) for path in folders if not any(path.iterdir())]
    empty = [str(name) for name in names if not any(part.startswith(".") for part in name.parts)]
    if not empty:
        return []
    named = ", ".join(map(repr, empty[:5])) + (
        f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    )
    return [
        f"{config.dataset_name} has folders without an image, which are no classes: {named}; put "
        "images into them, or remove them"
    ]


def folder_of(config: TrainConfig) -> Path:
    """Return the folder that paths within the data are relative to."""
    path = Path(config.dataset_name)
    return path if path.is_dir() else path.parent


def file_of(value: Any, folder: Path) -> Any:
    """Return what a file is opened by: its bytes, or its path."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        value = value.get("path")
    return None if not isinstance(value, str) or not value else folder / value


def read_image(value: Any, folder: Path) -> Any:
    """Read an image, as three colours.

    Raises
    ------
    ConfigError
        When there is none, or it cannot be read.
    """
    from PIL import Image

    file = file_of(value, folder)
    if file is None:
        raise ConfigError(f"{str(value)[:80]!r} is no image; expected one, or the path of a file.")
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises errors of many kinds for a damaged file
        name = file if isinstance(file, Path) else "an image within the data"
        raise ConfigError(f"{name} cannot be read as an image ({reason_of(error)}).") from error


def _check_images(part: Part, config: TrainConfig) -> None:
    folder = folder_of(config)
    for number, value in enumerate(part.dataset["image"]):
        try:
            read_image(value, folder)
        except ConfigError as error:
            where = place(config.dataset_name, part, number)
            raise ConfigError(f"{where}: {error} Replace it or leave the row out.") from error
