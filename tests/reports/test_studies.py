"""The committed study says what its committed logs say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPORTS = Path(__file__).resolve().parents[2] / "reports"
STUDIES = {  # name -> what the script writes beside the page
    "2026-11-23-skew": ("report.html", "profiles.png"),
    "2026-11-24-learned-sampling": ("losses.png",),
    "2026-11-27-validity": ("metrics.png", "worth.png"),
    "2026-11-27-sampling": ("selection.png", "sampling.png"),
    "2026-11-27-methods": ("methods.png",),
}
# Of plans whose missing runs are not for a test.
WORDS = {
    "2026-11-27-validity": ["--analyse"],
    "2026-11-27-sampling": ["--page"],
    "2026-11-27-methods": ["--page"],
}


@pytest.mark.parametrize("name", STUDIES)
def test_tables_and_figures_follow_from_the_kept_logs(tmp_path, name):
    folder = shutil.copytree(REPORTS / name, tmp_path / name)
    for shared in REPORTS.glob("*.py"):
        shutil.copy(shared, tmp_path)
    for made in STUDIES[name]:
        (folder / made).unlink()
    page = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(page.replace("|", "!"), encoding="utf-8")
    subprocess.run([sys.executable, "study.py", *WORDS.get(name, [])], cwd=folder, check=True)
    again = (folder / "README.md").read_text(encoding="utf-8")
    assert again.replace("!", "|") == page.replace("!", "|")
    assert again.count("|") > 50
    for made in STUDIES[name]:
        assert 1e4 < (folder / made).stat().st_size < 5e6


@pytest.mark.parametrize("name", STUDIES)
def test_the_logs_hold_nothing_of_the_machine(name):
    texts = [
        p
        for p in (REPORTS / name).rglob("*")
        if p.suffix in (".json", ".jsonl", ".yaml", ".html", ".md")
    ]
    assert len(texts) > (30 if (REPORTS / name / "runs").exists() else 1)
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for folder in ("root", "home", "tmp", "work"):
            assert f"/{folder}/" not in text, (path, folder)
