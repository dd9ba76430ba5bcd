"""WordNet as tasks: senses of its lines, splits, pinned files, and what is said without them."""

import hashlib
import json

import pytest

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo import wordnet

LINES = [
    "  1 This software and database is being provided to you, the LICENSEE, by",
    "00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is known; inferred  ",
    "00002684 03 n 02 physical_object 0 object 0 001 @ 1 n 0000 | a thing; casts a shadow; "
    '"full of rackets; balls"  ',
    '00001740 00 a 01 able(p) 0 001 = 1 n 0000 | (usually followed by `to\') having; "able to"  ',
    '00000001 00 a 01 odd 0 000 | "an example alone"  ',
]


def test_senses_of_a_file():
    assert list(wordnet.senses(LINES)) == [
        ("entity", "that which is known; inferred"),
        ("physical object", "a thing; casts a shadow"),
        ("able", "(usually followed by `to') having"),
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LISA_CACHE", str(tmp_path))
    monkeypatch.setattr(wordnet, "INSTALLED", tmp_path / "nowhere")
    kept = tmp_path / "wordnet"
    kept.mkdir()
    pins = {}
    for part in wordnet.FILES:
        text = "".join(f"1 00 n 01 {part}{i} 0 000 | {part} meaning {i}\n" for i in range(40))
        (kept / f"data.{part}").write_text(text)
        pins[part] = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(wordnet, "FILES", pins)
    monkeypatch.setattr(wordnet, "MOST", 20)
    return kept


def read(folder, split):
    return [json.loads(x) for x in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_both_tasks_take_all_parts_evenly_and_share_no_example(cache):
    folder = wordnet.definitions_folder()
    train, test = read(folder, "train"), read(folder, "test")
    assert len(train) == 72
    assert len(test) == 8
    assert test[0] == {"prompt": "Define the noun noun0:", "completion": " noun meaning 0"}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    rows = read(wordnet.parts_of_speech_folder(), "train")
    assert [row["label"] for row in rows[:4]] == ["noun", "verb", "adjective", "adverb"]
    assert rows[-1] == {"text": "adv meaning 38", "label": "adverb"}
    (cache / "data.noun").unlink()  # what was made is not made again
    assert wordnet.definitions_folder() == folder


def test_another_wordnet_is_refused(cache):
    (cache / "data.verb").write_text("1 00 n 01 other 0 000 | other\n")
    with pytest.raises(LisaError, match=r"data\.verb is not that of WordNet 3\.0"):
        wordnet.definitions_folder()


def test_without_apt_it_says_where_the_files_go(cache, monkeypatch):
    (cache / "data.adv").unlink()
    monkeypatch.setattr(wordnet.shutil, "which", lambda name: None)
    with pytest.raises(LisaError, match=r"install wordnet-base, or put data.noun, .* into "):
        wordnet.parts_of_speech_folder()
