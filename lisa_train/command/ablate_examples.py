"""The examples that an ablation measures: what a run held out, and general text."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.ablate_inputs import TrainedRun
from lisa_train.command.tasks.literal_paths import at_home

if TYPE_CHECKING:
    from lisa_train.command.config import TrainConfig
    from lisa_train.measure.ablation.losses import Rows

GENERAL_NAME = "passages of six books in the public domain"
# Tokens of a general text that is cut to no other length.
_GENERAL_LENGTH = 256


def held_out_rows(trained: TrainedRun, data: Any, collate: Callable[..., Any] | None) -> "Rows":
    """Return the examples that the run held out, or those of `data`.

    Parameters
    ----------
    trained
        The run.
    data
        None, a dataset as for `lisa-train`, or examples as a Trainer takes them.
    collate
        For examples: makes a batch; None stacks those of equal shapes.

    Raises
    ------
    ConfigError
        When nothing was held out, or the data cannot be used.
    """
    from lisa_train.measure.ablation.losses import Rows

    if data is not None and not isinstance(data, str | Path):
        rows: Sequence[Mapping[str, Any]] = data if hasattr(data, "__getitem__") else list(data)
        if not len(rows):
            raise ConfigError("data holds no example; give at least one, with labels.")
        name = "examples that were handed over"
        return Rows(name, rows, collate or _stack, len(rows), padded=collate is not None)
    config = trained.config
    if config is None or trained.tokenizer is None:
        raise ConfigError(
            f"{trained.run.path} was not trained by lisa-train, so its held-out examples are not "
            "known: give them, lt.ablate(run_dir, data=[…]), as its Trainer took them."
        )
    nothing = not config.eval_size and not config.dataset_test_split
    if data is None and nothing:
        raise ConfigError(
            f"{trained.run.path} held no example out (eval_size is 0): give some with --data FILE "
            "(in Python data=)."
        )
    return _prepared_rows(trained, config, given=data is not None)


def _prepared_rows(trained: TrainedRun, config: "TrainConfig", *, given: bool) -> "Rows":
    """Let the run's own trainer make the rows into what the model takes."""
    from lisa_train.command.training import trainer_arguments
    from lisa_train.measure.ablation.losses import Rows

    task = trained.task
    assert trained.loaded is not None
    assert task is not None
    data = trained.loaded.data
    if data.held_out is None and not given:
        raise ConfigError(
            f"{trained.run.path} held no example out: give some with --data FILE (in Python data=)."
        )
    if data.held_out is not None:  # what was trained on need not be prepared
        data = dataclasses.replace(data, train=data.train.select(range(1)))
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = trainer_arguments(config, Path(nowhere), task.arguments())
        loaded = dataclasses.replace(trained.loaded, data=data)
        trainer: Any = task.build_trainer(loaded, arguments, None, config)
        dataset = trainer.train_dataset if data.held_out is None else trainer.eval_dataset
        # As an evaluation sees it: without the columns that the model does not take.
        loader = trainer.get_eval_dataloader(dataset)
    return Rows(config.dataset_name, loader.dataset, loader.collate_fn, len(loader.dataset))


def general_rows(trained: TrainedRun, general: str | Path | None) -> "Rows":
    """Return general text as examples of which every token counts.

    Parameters
    ----------
    trained
        The run, for its tokenizer and its `max_length`.
    general
        A dataset with a column of text, as for `lisa-train`, or a .txt file of paragraphs with
        empty lines between them; None is what comes with the package.

    Raises
    ------
    ConfigError
        When it cannot be read, or the run has no tokenizer.
    """
    from lisa_train.measure.ablation.losses import Rows

    if trained.tokenizer is None:
        raise ConfigError(
            "there is no tokenizer for general text: leave it out with general=False."
        )
    config = trained.config
    most = config.max_length if config is not None else None
    texts = read_texts(general, config.dataset_text_field if config is not None else "text")
    limit = _GENERAL_LENGTH if most is None else min(most, _GENERAL_LENGTH)
    rows = [
        {"input_ids": ids}
        for text in texts
        if len(ids := trained.tokenizer(text, truncation=True, max_length=limit)["input_ids"]) > 1
    ]
    if not rows:
        raise ConfigError(f"{general} holds no text of two tokens or more.")
    name = GENERAL_NAME if general is None else str(general)
    return Rows(name, rows, _Padding(trained.tokenizer.pad_token_id or 0), len(rows))


def read_texts(general: str | Path | None, column: str = "text") -> list[str]:
    """Read general text; see `general_rows`."""
    if general is None:
        file = resources.files("lisa_train.command") / "general.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    path = Path(at_home(str(general)))
    if path.suffix == ".txt" and path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as text ({error}).") from error
        found = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
        if not found:
            raise ConfigError(f"{path} is empty; expected paragraphs with empty lines between.")
        return found
    from lisa_train.command.config import TrainConfig
    from lisa_train.command.tasks.data import load_data

    config = TrainConfig(".", str(path), eval_size=0, dataset_text_field=column)
    data = load_data(config)
    if data.layout != "text":
        raise ConfigError(
            f"{path} has the layout {data.layout}; general text is a column {column!r}, or a .txt "
            "file of paragraphs."
        )
    return list(data.train[column])


class _Padding:
    """Pads token ids at the right; every real token is a label."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _stack(rows: list[Any]) -> dict[str, Any]:
    import torch

    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
