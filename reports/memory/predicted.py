"""What the estimate says of every case of measure.py on Llama-3.1-8B, as Markdown; no GPU.

python reports/memory/predicted.py             prints the table
python reports/memory/predicted.py --write     puts it into docs/memory.md
python reports/memory/predicted.py "LoRA r=16" prints the row of that case
"""

import re
import sys
from pathlib import Path

from cases import cases
from shapes import SHAPES

from lisa_train.estimate.memory import estimate
from lisa_train.estimate.result import PARTS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
SHAPE = "Llama-3.1-8B"


def row_of(name: str) -> str:
    """One Markdown row; LISA's layers are those that cost the most."""
    [case] = [case for case in cases(1, 1024) if case.name == name]
    found = estimate(SHAPES[SHAPE], case.setting)
    sizes = [getattr(found.fullest, part) for part in PARTS]
    cells = [f"{size / 1e9:.2f}" for size in (*sizes, found.total, found.mean)]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(names: list[str]) -> str:
    columns = ("case", *PARTS, "peak", "mean peak")
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)
    return "\n".join([head, *map(row_of, names)])


def main(arguments: list[str]) -> None:
    chosen = [a for a in arguments if not a.startswith("--")]
    text = table(chosen or [case.name for case in cases(1, 1024)])
    print(text)
    if "--write" in arguments:
        page = DOCS.read_text(encoding="utf-8")
        marks = r"(<!-- predicted -->\n).*?(\n<!-- /predicted -->)"
        DOCS.write_text(re.sub(marks, lambda m: m[1] + text + m[2], page, flags=re.S), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
