"""Conversations between people as prompt/completion examples in JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lisa_train.demo.sources import CHITCHAT, cache_dir, fetch

TURNS = 3  # turns per example: about 75 tokens
# Said instead of the model's own, longer, system prompt: tokens cost time on a CPU.
SYSTEM = {"role": "system", "content": "Two people chat."}
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


def examples(turns: list[list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
    """Cut a conversation into pieces of `TURNS` turns; the first turn is the prompt.

    A turn is a list of consecutive messages by one person. Both people are worth learning from,
    so the loss runs over every turn but the first.
    """
    spoken = ["\n".join(message["text"] for message in turn) for turn in turns]
    for start in range(0, len(spoken), TURNS):
        piece = [
            {"role": ("user", "assistant")[i % 2], "content": text}
            for i, text in enumerate(spoken[start : start + TURNS])
        ]
        if len(piece) == TURNS:
            yield {"prompt": [SYSTEM, piece[0]], "completion": piece[1:]}
