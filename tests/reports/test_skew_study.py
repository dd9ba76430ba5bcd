"""The committed study says what its committed logs say."""

import shutil
import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parents[2] / "reports" / "2026-11-23-skew"


def test_tables_figure_and_report_follow_from_the_kept_logs(tmp_path):
    folder = shutil.copytree(STUDY, tmp_path / STUDY.name)
    for shared in STUDY.parent.glob("*.py"):
        shutil.copy(shared, tmp_path)
    (folder / "report.html").unlink()
    (folder / "profiles.png").unlink()
    page = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(page.replace("|", "!"), encoding="utf-8")
    subprocess.run([sys.executable, "study.py"], cwd=folder, check=True)
    again = (folder / "README.md").read_text(encoding="utf-8")
    assert again.replace("!", "|") == page.replace("!", "|")
    assert again.count("|") > 300
    assert (folder / "report.html").stat().st_size < 5e6
    assert (folder / "profiles.png").stat().st_size > 1e5


def test_the_logs_hold_nothing_of_the_machine():
    texts = [
        p for p in STUDY.rglob("*") if p.suffix in (".json", ".jsonl", ".yaml", ".html", ".md")
    ]
    assert len(texts) > 30
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for word in ("/root/", "/home/", "/tmp/", "/work/"):
            assert word not in text, (path, word)
