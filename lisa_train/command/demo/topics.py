"""What a conversation was started with: a classification of the conversations of the demo."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lisa_analysis.contract.paths import cache_dir
from lisa_train.command.demo.sources import CHITCHAT, fetch

CLASSES = 8  # of 36 questions that conversations were started with, the commonest
TURNS = 8  # turns of a conversation that are read
HELD_OUT_EVERY = 8  # conversations


def topics_folder() -> Path:
    """Return a folder with train.jsonl and test.jsonl, writing it on first use."""
    folder = cache_dir() / "chitchat-topics"
    if (folder / "test.jsonl").is_file():
        return folder
    conversations = json.loads(fetch(CHITCHAT).read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for number, row in enumerate(rows(conversations)):
        splits["test" if number % HELD_OUT_EVERY == 0 else "train"].append(json.dumps(row))
    for split, lines in splits.items():  # test.jsonl last: it marks the folder as complete
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rows(conversations: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield the beginning of every conversation with one of the commonest questions."""
    counts = Counter(c.get("prompt") for c in conversations.values() if c.get("prompt"))
    common = {question for question, _ in counts.most_common(CLASSES)}
    for conversation in conversations.values():
        if conversation.get("prompt") not in common:
            continue
        turns = conversation["messages"][:TURNS]
        text = "\n".join(" ".join(message["text"] for message in turn) for turn in turns)
        if text.strip():
            yield {"text": text, "label": conversation["prompt"]}
