"""CITATION.cff says what pyproject.toml says."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_agrees_with_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)  # what the format requires
    assert cited["title"] == project["name"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["abstract"].strip() == project["description"]
    assert cited["keywords"] == project["keywords"]
    # No person is named whom pyproject does not name; the format wants one author at least.
    named = {person["name"] for person in project.get("authors", [])}
    persons = {
        f"{a['given-names']} {a['family-names']}" for a in cited["authors"] if "name" not in a
    }
    assert persons <= named
