"""`make demo-vision`: full, LoRA, LISA and the head alone on small pictures of clothes."""

import sys
from pathlib import Path

from lisa_train.command.demo.compare import Comparison, chance, run_comparison


def _model() -> Path:
    from lisa_train.command.demo.dinov2 import dinov2_folder

    return dinov2_folder()


def _data() -> Path:
    from lisa_train.command.demo.pictures import pictures_folder

    return pictures_folder()


DEMO = Comparison(
    name="demo-vision",
    about=str(__doc__),
    steps=120,
    model=_model,
    model_words="DINOv2-small, for images of 56 × 56",
    data=_data,
    data_words="Fashion-MNIST, or scikit-learn's digits where that cannot be had: `image`, `label`",
    # LISA, one seed, 120 steps: accuracy .750 at 6e-5, .648 at 2e-4, .621 at 5e-4, .574 at 1e-3.
    rates={"head": "3e-3", "lisa": "6e-5", "lora": "1e-3", "full": "5e-5"},
    scores={"accuracy": "accuracy", "macro-F1": "macro_f1"},
    held_out="images",
    yardstick=chance,
)

if __name__ == "__main__":
    sys.exit(run_comparison(DEMO))
