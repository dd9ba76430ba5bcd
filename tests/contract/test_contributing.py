"""CONTRIBUTING.md: the floor plan is that of today's folders, and what it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = ("lisa_train", "lisa_analysis")
# Those that stand in the row of the folder around them.
WITHIN = {"lisa_train/methods/lisa/samplers", "lisa_train/methods/lisa/learning"}


def folders() -> set[str]:
    """Every package below the rooms."""
    return {
        str(init.parent.relative_to(ROOT))
        for package in ROOMS
        for init in (ROOT / package).glob("*/*/**/__init__.py")
    }


def test_every_folder_within_a_room_is_in_the_floor_plan() -> None:
    table = TEXT[TEXT.index("Folders within rooms") :].split("\n\n")[1]
    named = set(re.findall(r"`(lisa_(?:train|analysis)/[\w/]+)`", table))
    assert folders() - WITHIN == named - {"lisa_train/command/recipes"}
    for path in WITHIN:
        assert f"`{Path(path).name}`" in table


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_is_in_the_picture(package: str) -> None:
    picture = TEXT.split("```")[1]
    for path in (ROOT / package).iterdir():
        if (path / "__init__.py").exists() and path.name != "private_names":
            assert re.search(rf"(^|\s){path.name}\s", picture), path.name


def test_every_path_is_there() -> None:
    paths = re.findall(r"`((?:lisa_train|lisa_analysis|tests|docs)/[\w./-]+)`", TEXT)
    assert len(paths) > 40
    for path in paths:
        assert (ROOT / path).exists(), path
