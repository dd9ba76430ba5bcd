"""The estimate beside the paper's Table 1 (arXiv 2403.17919, v1), as Markdown.

python reports/memory/paper.py            prints the table
python reports/memory/paper.py --write    puts it into docs/memory.md
python reports/memory/paper.py GPT2-Small prints the rows of that model
"""

import re
import sys
from pathlib import Path

from shapes import SHAPES

from lisa_train.estimate.memory import estimate
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage

DOCS = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
COLUMNS = ("full", "LoRA 128", "LoRA 256", "LoRA 512", "E+H", "E+H+2L", "E+H+4L")
# GB of the paper; None is its "OOM". The 70B row is per device of four.
PAPER: dict[str, tuple[float | None, ...]] = {
    "GPT2-Small": (3.8, 3.3, 3.5, 3.7, 3.3, 3.3, 3.4),
    "TinyLlama-1.1B": (13, 7.9, 8.6, 10, 7.4, 8.0, 8.3),
    "Phi-2": (28, 14.3, 15.5, 18, 13.5, 14.6, 15),
    "Mistral-7B": (59, 23, 26, 28, 21, 23, 24),
    "LLaMA-2-7B": (59, 23, 26, 28, 21, 23, 24),
    "LLaMA-2-70B": (None, 79, None, None, 71, 75, 79),
}


def settings(model: str, attention: str) -> dict[str, Setting]:
    """Return what the paper states (batch 1, 1024 tokens, no checkpointing), all in bf16.

    As in its script, the last layers train, and adapters have the precision of the weights.
    """
    layers = SHAPES[model].num_hidden_layers
    spread = {"devices": 4, "spread": "layers"} if model == "LLaMA-2-70B" else {}
    common = {"dtype": "bfloat16", "attn_implementation": attention, **spread}
    rows = {"full": Setting(method="full", **common)}
    for rank in (128, 256, 512):
        rows[f"LoRA {rank}"] = Setting(
            method="lora", lora={"r": rank}, autocast_adapter_dtype=False, **common
        )
    for name, k in (("E+H", 0), ("E+H+2L", 2), ("E+H+4L", 4)):
        last = tuple(range(layers - k, layers))
        rows[name] = Setting(method="lisa", active_layers=last, **common)
    return rows


def estimates(model: str, attention: str) -> dict[str, float]:
    """Peak in GB of every column; full fine-tuning and LISA share one model."""
    rows = settings(model, attention)
    shared = Stage(SHAPES[model], rows["full"])
    return {
        name: estimate(SHAPES[model] if setting.method == "lora" else shared, setting).total / 1e9
        for name, setting in rows.items()
    }


def rows_of(model: str) -> list[str]:
    """Markdown rows of a model: the paper, and the estimate with both kinds of attention."""
    paper = PAPER[model]
    shown = ["OOM" if value is None else f"{value:g}" for value in paper]
    lines = [f"| {model} | paper | " + " | ".join(shown) + " |"]
    for attention in ("sdpa", "eager"):
        found = estimates(model, attention)
        cells = [_beside(found[name], value) for name, value in zip(COLUMNS, paper, strict=True)]
        lines.append(f"| | {attention} | " + " | ".join(cells) + " |")
    return lines


def _beside(found: float, paper: float | None) -> str:
    if paper is None:
        return f"{found:.1f}"
    return f"{found:.1f} ({found / paper - 1:+.0%})"


def table(models: list[str]) -> str:
    head = "| model | GB | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS)
    return "\n".join([head, *(line for model in models for line in rows_of(model))])


def write(text: str) -> None:
    """Put the table between its marks in docs/memory.md."""
    page = DOCS.read_text(encoding="utf-8")
    marks = r"(<!-- paper -->\n).*?(\n<!-- /paper -->)"
    DOCS.write_text(re.sub(marks, lambda m: m[1] + text + m[2], page, flags=re.S), "utf-8")


def main(arguments: list[str]) -> None:
    models = [a for a in arguments if not a.startswith("-")] or list(PAPER)
    text = table(models)
    print(text)
    if "--write" in arguments:
        write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
