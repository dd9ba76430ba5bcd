"""What the site changes in the pages, which are read in the repository as well."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)#]+)(?:#[^)]*)?\)")
_PRINTED = re.compile(r"<!-- printed:(?P<what>[a-z]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository that are no pages; print the tables of the contract."""
    return _PRINTED.sub(_print, _OUTSIDE.sub(_named, markdown))


def _named(found: re.Match[str]) -> str:
    if not (ROOT / found["path"]).exists():
        raise FileNotFoundError(f"a page links to ../{found['path']}, which does not exist")
    return f"{found['text']} (`{found['path']}`)"


def _print(found: re.Match[str]) -> str:
    sys.path.insert(0, str(ROOT))
    from lisa_analysis.contract import schema

    if found["what"] == "layout":
        return schema.layout_to_markdown()
    tables = {"metrics": schema.METRICS_TABLE, "probes": schema.PROBES_TABLE,
              "scalars": schema.SCALARS_TABLE, "parameters": schema.PARAMETERS_TABLE,
              "ablation": schema.ABLATION_TABLE}  # fmt: skip
    return schema.to_markdown(tables[found["what"]])
