"""docs/memory.md: its tables are what the scripts print."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
SCRIPTS = ROOT / "reports" / "memory"


def section(name: str) -> list[str]:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)
    assert found, f"docs/memory.md has no section {name}"
    return found[1].splitlines()


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run a script in this process; return the lines that it prints."""

    def run(script: str, *arguments: str) -> list[str]:
        monkeypatch.syspath_prepend(SCRIPTS)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_smallest_model_of_the_papers_table_is_the_code_s_output(printed):
    assert printed("paper.py", "GPT2-Small") == section("paper")[:5]


def test_the_goal_s_rows_are_the_code_s_output(printed):
    names = ["LoRA r=16", "LISA 2L, no E, H, norm"]
    lines = section("predicted")
    rows = [line for name in names for line in lines if line.startswith(f"| {name} |")]
    assert printed("predicted.py", *names) == [*lines[:2], *rows]


def test_the_measured_rows_are_those_of_the_studies():
    known = {}
    for folder, tokens in (("2026-11-25-cpu-whole", ""), ("2026-11-25-cpu-512", ", 512 tokens")):
        results = json.loads((SCRIPTS / folder / "results.json").read_text(encoding="utf-8"))
        for row in results["rows"]:
            found, guess = row.get("measured"), row["estimate"]
            if found is not None:
                sizes = (guess["total"], found["peak_allocated"], found["peak_resident"])
                cells = [row["shape"] + tokens, row["case"], *(f"{x / 1e9:.2f}" for x in sizes)]
                known["| " + " | ".join(cells) + " |"] = row
    rows = section("measured")[2:]
    assert len(rows) >= 7
    assert not set(rows) - set(known)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "name"), [("paper.py", "paper"), ("predicted.py", "predicted")])
def test_all_rows_are_the_code_s_output(printed, script, name):
    assert printed(script) == section(name), f"run: python reports/memory/{script} --write"
