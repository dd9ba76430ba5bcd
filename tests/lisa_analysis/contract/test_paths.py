"""Files that stand whole under their name, or as they were."""

import os

import pytest

from lisa_analysis.contract.paths import whole_file


def test_what_stood_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("old")

    def cut_short():
        with whole_file(path) as file:
            file.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        cut_short()
    assert path.read_text() == "old"
    with whole_file(path) as file:
        assert file.suffix == ".json"
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["p.json"]


def test_links_and_streams_stay_what_they_are(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    with whole_file(tmp_path / "link.csv") as file:
        file.write_text("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with whole_file(tmp_path / "pipe") as file:
        assert file == tmp_path / "pipe"
