"""Conversations between people as plain text in JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from lisa_analysis.contract.paths import cache_dir
from lisa_train.command.demo.sources import CHITCHAT, fetch

TURNS = 4  # turns per example: 60 to 70 tokens
HELD_OUT_EVERY = 10  # conversations; whole ones, so that no conversation is in both splits


def chitchat_folder() -> Path:
    """Return a folder with train.jsonl and test.jsonl, writing it on first use."""
    folder = cache_dir() / "chitchat"
    if (folder / "test.jsonl").is_file():
        return folder
    conversations = json.loads(fetch(CHITCHAT).read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for number, conversation in enumerate(conversations.values()):
        split = "test" if number % HELD_OUT_EVERY == 0 else "train"
        splits[split] += map(json.dumps, examples(conversation["messages"]))
    for split, lines in splits.items():  # test.jsonl last: it marks the folder as complete
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def examples(turns: list[list[dict[str, str]]]) -> Iterator[dict[str, str]]:
    """Cut a conversation into pieces of `TURNS` turns; a remainder is dropped.

    A turn is a list of consecutive messages by one person. Plain text, rather than the model's
    chat format, because there every token is worth learning and none is spent on a frame: tokens
    cost time on a CPU.
    """
    spoken = [" ".join(message["text"] for message in turn) for turn in turns]
    for start in range(0, len(spoken) - TURNS + 1, TURNS):
        piece = spoken[start : start + TURNS]
        yield {"text": "\n".join(f"{'AB'[i % 2]}: {text}" for i, text in enumerate(piece))}
