"""`make demo-classify`: full, LoRA, LISA and the head alone on a real classification."""

import sys
from pathlib import Path

from lisa_train.command.demo.compare import Comparison, chance, run_comparison


def _model() -> Path:
    from lisa_train.command.demo.sources import MINILM, fetch_folder

    return fetch_folder(MINILM)


def _data() -> Path:
    from lisa_train.command.demo.topics import topics_folder

    return topics_folder()


DEMO = Comparison(
    name="demo-classify",
    about=str(__doc__),
    steps=80,
    model=_model,
    model_words="all-MiniLM-L6-v2",
    data=_data,
    data_words="what a conversation of BYU Chit-Chat was started with: `text` and `label`",
    rates={"head": "3e-3", "lisa": "2e-4", "lora": "1e-3", "full": "1e-4"},
    scores={"accuracy": "accuracy", "macro-F1": "macro_f1"},
    held_out="conversations",
    yardstick=chance,
)

if __name__ == "__main__":
    sys.exit(run_comparison(DEMO))
