"""What the studies of many arms train: models, data, sizes. Their DESIGN.md say why."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

BITS = "--bf16=true"  # of the products; weights stay in fp32
RATES = (0.1, 0.316, 1.0, 3.16, 10.0)  # the grid, around the centre of a family


@dataclass(frozen=True)
class Environment:
    """A model and a task.

    Parameters
    ----------
    name
        As in the studies' DESIGN.md.
    model, data
        Give the folders, fetching them on first use.
    stacks
        Path of each stack of layers, as it stands in the names of modules, and its number of
        layers; layers are numbered on from one stack to the next.
    linear
        Names of the linear maps within a layer.
    few
        Layers of each stack that train in question A: a fifth of them.
    drawn, interval
        k and K of question B.
    steps, batch
        Of a run.
    evaluated
        Held-out examples, the first ones.
    words
        Other settings of `lisa-train`.
    centres
        Learning rate in the middle of each family's grid.
    head
        Whether the model has a new head, which trains under every method.
    seeds, secondary
        Seeds of the arms of the primary contrasts, and of the others.
    whole
        Whether every arm is run, or only those that carry the contrasts.
    longer
        Whether the primary contrasts are run once more at four times the steps.
    every_layer
        Whether question A trains every layer alone, instead of named and random sets.
    both_tuned
        Whether a family's rate is looked for by profile arm and placebo on two seeds each, or by
        one on one seed and the other on the other.
    evaluations
        Of a final run of the study of sampling, of which the last counts. They draw from the
        generator of dropout, so that an environment keeps the number it began with.
    """

    name: str
    model: Callable[[], Path]
    data: Callable[[], Path]
    stacks: tuple[tuple[str, int], ...]
    linear: tuple[str, ...]
    few: int
    drawn: int
    interval: int
    steps: int
    batch: int
    evaluated: int
    words: tuple[str, ...]
    centres: dict[str, float] = field(default_factory=dict)
    head: bool = True
    seeds: int = 5
    secondary: int = 5
    whole: bool = False
    longer: bool = False
    every_layer: bool = False
    both_tuned: bool = False
    evaluations: int = 2

    @property
    def layers(self) -> int:
        """Layers of all stacks."""
        return sum(size for _, size in self.stacks)

    def targets(self, chosen: Sequence[int]) -> str:
        """Return the pattern of the linear maps of some layers, for PEFT's `target_modules`."""
        parts, first = [], 0
        for path, size in self.stacks:
            inside = [str(i - first) for i in chosen if first <= i < first + size]
            if inside:
                parts.append(rf"{path}\.({'|'.join(inside)})")
            first += size
        return rf".*({'|'.join(parts)})\..*({'|'.join(self.linear)})"

    def top(self, scores: Sequence[float], *, lowest: bool = False) -> list[int]:
        """Return the `few` layers of each stack with the highest scores, in order."""
        chosen, first = [], 0
        for _, size in self.stacks:
            inside = range(first, first + size)
            order = sorted(inside, key=lambda i: scores[i], reverse=not lowest)
            chosen += order[: self.few]
            first += size
        return sorted(chosen)


def with_validation(name: str, folder: Path, work: Path, rows: int, *, mixed: bool = False) -> Path:
    """Return a copy of a data folder some of whose training rows are a `validation` split.

    The folder has `train` and `test` as lines of JSON, as Parquet, or as folders of sounds.

    Parameters
    ----------
    name, folder, work
        Of the copy; what is copied; where to.
    rows
        Of the split.
    mixed
        Draw them from all training rows, and put the test rows in an order of chance: WordNet goes
        by subject and conversations lie in pieces, so that the last rows, or the first ones, are of
        few. Without it the last rows.
    """
    found = work / name
    if (found / "whole").exists():
        return found
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir(parents=True)
    if (folder / "train.jsonl").exists():
        _split_lines(folder, found, rows, mixed)
    elif (folder / "train.parquet").exists():
        table = pq.read_table(folder / "train.parquet")
        pq.write_table(table[:-rows], found / "train.parquet")
        pq.write_table(table[-rows:], found / "validation.parquet")
        shutil.copy(folder / "test.parquet", found)
    else:
        head, *lines = (folder / "train/metadata.csv").read_text(encoding="utf-8").splitlines()
        for split, part in (("train", lines[:-rows]), ("validation", lines[-rows:])):
            (found / split).mkdir()
            (found / split / "metadata.csv").write_text("\n".join([head, *part]), encoding="utf-8")
            for line in part:
                shutil.copy(folder / "train" / line.split(",")[0], found / split)
        shutil.copytree(folder / "test", found / "test")
    (found / "whole").touch()  # a copy that was cut short is made again
    return found


def _split_lines(folder: Path, found: Path, rows: int, mixed: bool) -> None:
    lines, test = (
        (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for split in ("train", "test")
    )
    if mixed:
        for part in (lines, test):
            random.Random(0).shuffle(part)
    parts = {"train": lines[:-rows], "validation": lines[-rows:], "test": test}
    for split, part in parts.items():
        (found / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")


def environments(work: Path, *, mixed: bool = False) -> dict[str, Environment]:
    """Return the environments that the studies can run here, by name.

    `mixed` draws what rates are chosen on, and the order of what is held out, from all of a text's
    rows, see `with_validation`; the study of methods was made without it.
    """
    data = work / "data"
    return {each.name: each for each in (*_classes(data, mixed), *_language(data, mixed))}


def _classes(data: Path, mixed: bool) -> list[Environment]:
    """Texts and pictures to be told apart, by a new head."""
    from lisa_train.command.demo.dinov2 import dinov2_folder
    from lisa_train.command.demo.pictures import pictures_folder
    from lisa_train.command.demo.sources import MINILM, fetch_folder
    from lisa_train.command.demo.wordnet import parts_of_speech_folder

    return [
        Environment(
            "pos",
            model=lambda: fetch_folder(MINILM),
            data=lambda: with_validation(
                "pos", parts_of_speech_folder(), data, 1200, mixed=mixed
            ),
            stacks=((r"encoder\.layer", 6),),
            linear=("query", "key", "value", "dense"),
            few=1, drawn=1, interval=3, steps=100, batch=16, evaluated=1024,
            words=(
                "--task=text-classification", "--max_length=32",
                "--per_device_eval_batch_size=64", BITS,
            ),
            centres={
                "lora-few": 1e-3, "lora-low": 1e-3, "lora-all": 1e-3, "weights-few": 5e-4,
                "weights-all": 2e-4, "full": 2e-4, "mild": 5e-4, "strong": 5e-4, "head": 1e-2,
                "parts": 5e-4,
            },
            seeds=10, whole=True, every_layer=True, both_tuned=True,
        ),
        Environment(
            "fashion",
            model=dinov2_folder,
            data=lambda: with_validation("fashion", pictures_folder(), data, 1600),
            stacks=((r"encoder\.layer", 12),),
            linear=("query", "key", "value", "dense", "fc1", "fc2"),
            few=2, drawn=2, interval=3, steps=100, batch=16, evaluated=1000,
            words=("--task=image-classification", "--per_device_eval_batch_size=64", BITS),
            centres={
                "lora-few": 1e-3, "lora-low": 1e-3, "lora-all": 1e-3, "weights-few": 2e-4,
                "weights-all": 1e-4, "full": 1e-4, "mild": 3e-4, "strong": 3e-4, "head": 1e-2,
                "parts": 1e-4,
            },
            seeds=10, whole=True, both_tuned=True, longer=True,
        ),
    ]  # fmt: skip


def _language(data: Path, mixed: bool) -> list[Environment]:
    """Text and speech to be written, by the head that the model has."""
    from lisa_train.command.demo.chitchat import chitchat_folder
    from lisa_train.command.demo.smollm2 import smollm2_folder
    from lisa_train.command.demo.voice import voice_folder
    from lisa_train.command.demo.whisper import whisper_folder
    from lisa_train.command.demo.wordnet import definitions_folder

    llama = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    smol = {
        "lora-few": 1e-3, "lora-low": 1e-3, "lora-all": 1e-3, "full": 5e-5, "mild": 2e-4,
        "strong": 2e-4,
    }  # fmt: skip
    text = ("--max_length=48", "--per_device_eval_batch_size=16", BITS)
    return [
        Environment(
            "define",
            model=smollm2_folder,
            data=lambda: with_validation(
                "define", definitions_folder(), data, 1200, mixed=mixed
            ),
            stacks=((r"model\.layers", 30),),
            linear=llama, few=6, drawn=2, interval=1, steps=75, batch=4, evaluated=256,
            words=text, centres=smol, head=False, longer=True,
        ),
        Environment(
            "chat",
            model=smollm2_folder,
            data=lambda: with_validation("chat", chitchat_folder(), data, 1000, mixed=mixed),
            stacks=((r"model\.layers", 30),),
            linear=llama, few=6, drawn=2, interval=1, steps=75, batch=4, evaluated=256,
            words=text, centres=smol, head=False, evaluations=1,
        ),
        Environment(
            "voice",
            model=whisper_folder,
            data=lambda: with_validation("voice", voice_folder(), data, 60),
            stacks=((r"encoder\.layers", 4), (r"decoder\.layers", 4)),
            linear=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
            few=1, drawn=2, interval=2, steps=40, batch=8, evaluated=100,
            words=("--task=speech-recognition", "--per_device_eval_batch_size=30", BITS),
            centres={
                "lora-few": 1e-3, "lora-low": 1e-3, "lora-all": 1e-3, "full": 5e-5,
                "mild": 1e-4, "strong": 1e-4,
            },
            head=False,
        ),
    ]  # fmt: skip
