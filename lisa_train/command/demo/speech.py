"""`make demo-speech`: full, LoRA, LISA and the head alone on voices that Whisper mishears."""

import sys
from pathlib import Path
from typing import Any

from lisa_train.command.demo.compare import Comparison, run_comparison


def _model() -> Path:
    from lisa_train.command.demo.whisper import whisper_folder

    return whisper_folder()


def _data() -> Path:
    from lisa_train.command.demo.voice import voice_folder

    return voice_folder()


def _yardstick(run: Any) -> str:
    return "Sentences that are held out are not in training, their words are."


DEMO = Comparison(
    name="demo-speech",
    about=str(__doc__),
    steps=40,
    model=_model,
    model_words="Whisper tiny.en, for sounds of up to six seconds",
    data=_data,
    data_words="sentences of BYU Chit-Chat in voices of eSpeak NG, in noise: `audio`, `text`",
    rates={"head": "1e-4", "lisa": "1e-4", "lora": "1e-3", "full": "3e-5"},
    scores={"word error rate": "word_error_rate"},
    held_out="sentences",
    yardstick=_yardstick,
)

if __name__ == "__main__":
    sys.exit(run_comparison(DEMO))
