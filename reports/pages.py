"""Markdown tables, and where they stand in a study's page of text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lisa_analysis.contract.errors import LisaError


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows as a Markdown table; the first one gives the columns."""
    head = list(rows[0])
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(str(row[column]) for column in head) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` of a page."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise LisaError(f"{page} lacks the marks <!-- {name} --> and <!-- /{name} -->.")
        text = re.sub(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
