"""Data in every accepted layout and container; every complaint names what was found."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers_models import write_jsonl

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.tasks.data import TrainingData, load_data
from lisa_train.config import TrainConfig


def load(name: Path | str, **settings: object) -> TrainingData:
    return load_data(TrainConfig("m", str(name), **settings))  # type: ignore[arg-type]


def rows(n: int) -> list[dict[str, str]]:
    return [{"text": f"line {i}"} for i in range(n)]


@pytest.fixture
def containers(tmp_path: Path) -> dict[str, Path]:
    """The same forty lines as JSONL, Parquet, saved dataset, saved splits and folder of files."""
    data = Dataset.from_list(rows(40))
    paths = {
        "jsonl": tmp_path / "d.jsonl",
        "parquet": tmp_path / "d.parquet",
        "saved": tmp_path / "saved",
        "splits": tmp_path / "splits",
        "folder": tmp_path / "folder",
    }
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    data.to_parquet(paths["parquet"])
    data.save_to_disk(paths["saved"])
    DatasetDict(train=data, test=Dataset.from_list(rows(7))).save_to_disk(paths["splits"])
    paths["folder"].mkdir()
    for split, n in (("train", 40), ("test", 7)):
        (paths["folder"] / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(n))
        )
    return paths


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_one_split_is_divided_without_overlap(kind: str, containers: dict[str, Path]) -> None:
    data = load(containers[kind], eval_size=0.1)
    assert data.held_out is not None
    train, held_out = set(data.train["text"]), set(data.held_out["text"])
    assert (len(train), len(held_out)) == (36, 4)
    assert not train & held_out


@pytest.mark.parametrize("kind", ["splits", "folder"])
def test_a_test_split_is_used_as_it_is(kind: str, containers: dict[str, Path]) -> None:
    data = load(containers[kind])
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (40, 7)


def test_the_held_out_examples_do_not_depend_on_the_seed(containers: dict[str, Path]) -> None:
    first, second = (load(containers["jsonl"], seed=seed).held_out for seed in (1, 2))
    assert first is not None
    assert second is not None
    assert first["text"] == second["text"]


def test_limits_and_no_held_out(containers: dict[str, Path]) -> None:
    data = load(containers["splits"], max_train_samples=5, max_eval_samples=100)
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (5, 7)
    assert load(containers["jsonl"], eval_size=0).held_out is None
    assert len(load(containers["jsonl"], eval_size=3).held_out or []) == 3


def test_layouts_are_recognised(text_file: Path, completion_file: Path, chat_file: Path) -> None:
    assert load(text_file).layout == "text"
    assert load(completion_file).layout == "prompt/completion"
    assert load(chat_file).layout == "messages"


def test_completion_only_loss_on_chat_keeps_the_last_turn(chat_file: Path) -> None:
    data = load(chat_file, completion_only_loss=True)
    first = data.train[0]
    assert [turn["role"] for turn in first["prompt"]] == ["user", "assistant", "user"]
    assert [turn["role"] for turn in first["completion"]] == ["assistant"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "is an empty file"),
        ("notes.docx", "x", "ends in '.docx'"),
        ("torn.jsonl", '{"text": "a"}\n{"text": ', "cannot be read"),
        ("columns.jsonl", '{"txt": "a"}\n', "Did you mean 'text'?"),
        ("numbers.jsonl", '{"text": 3}\n', "holds int; expected text"),
        ("chat.jsonl", '{"messages": "hello"}\n', "must be a list of {role, content}"),
        ("one.jsonl", '{"text": "a"}\n', "leaves nothing to train on"),
    ],
)
def test_bad_data_is_refused_in_one_sentence(
    name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_misspelt_files_and_splits_are_suggested(text_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'text\.jsonl'"):
        load(text_file.with_name("txt.jsonl"))
    with pytest.raises(ConfigError, match="has no split 'trian', only"):
        load_data(TrainConfig("m", str(_saved_splits(text_file)), dataset_train_split="trian"))


def _saved_splits(near: Path) -> Path:
    path = near.with_name("splits")
    DatasetDict(train=Dataset.from_list(rows(4))).save_to_disk(path)
    return path


def test_an_empty_folder_and_plain_text_with_completion_loss(
    tmp_path: Path, text_file: Path
) -> None:
    with pytest.raises(ConfigError, match="is an empty folder"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is plain text"):
        load(text_file, completion_only_loss=True)


def test_an_unknown_hub_id_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="neither a file or folder here nor a dataset"):
        load("nobody/no-such-dataset")


INSTRUCTIONS = [
    {"instruction": f"Name a colour {n}.", "input": "of the sky" if n % 2 else "", "output": "blue"}
    for n in range(20)
]


@pytest.mark.parametrize("chat", [False, True])
def test_instructions_become_prompts(chat: bool, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", INSTRUCTIONS)
    data = load_data(TrainConfig("m", str(path), eval_size=0), chat=chat)
    assert data.layout == "instruction/output"
    assert data.conversational == chat
    asked = "Name a colour 1.\n\nof the sky"
    if chat:
        assert data.train[1]["prompt"] == [{"role": "user", "content": asked}]
        assert data.train[1]["completion"] == [{"role": "assistant", "content": "blue"}]
    else:
        assert data.train[1] == {"prompt": asked + "\n\n", "completion": "blue"}
        assert data.train[0]["prompt"] == "Name a colour 0.\n\n"


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables_are_read_with_their_columns_named(
    suffix: str, separator: str, tmp_path: Path
) -> None:
    rows = [separator.join(("task", "text", "output"))]
    rows += [separator.join((row["instruction"], "other", "blue")) for row in INSTRUCTIONS]
    path = tmp_path / f"d{suffix}"
    path.write_text("\n".join(rows) + "\n")
    columns = {"instruction": "task"}
    data = load_data(TrainConfig("m", str(path), eval_size=0, columns=columns))
    assert data.train[2]["prompt"] == "Name a colour 2.\n\n"
    assert data.unused == ("text",)
    swapped = load_data(TrainConfig("m", str(path), eval_size=0, columns={"text": "task"}))
    assert swapped.train[2] == {"text": "Name a colour 2."}
    with pytest.raises(ConfigError, match=r"columns.text is 'tasks', .*'task', .*Did you mean"):
        load_data(TrainConfig("m", str(path), columns={"text": "tasks"}))


def test_instructions_without_an_answer_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*INSTRUCTIONS, {"instruction": "a", "output": None}])
    with pytest.raises(ConfigError, match=r"row 21 .*column 'output' holds nothing"):
        load_data(TrainConfig("m", str(path), eval_size=0))


@pytest.mark.parametrize("kind", ["a.csv", "b.tsv", "C.CSV", "folder"])
def test_words_that_pandas_takes_for_nothing_are_words(kind: str, tmp_path: Path) -> None:
    separator = "\t" if kind == "b.tsv" else ","
    words = ["NA", "null", "None", "nan", "n/a"]
    lines = [separator.join(("text", "note")), *(f"{w}{separator}" for w in words)]
    path = tmp_path / kind / "train.csv" if kind == "folder" else tmp_path / kind
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    data = load(tmp_path / kind, eval_size=0)
    assert list(data.train["text"]) == words


def test_an_empty_cell_is_still_nothing(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("instruction,input,output\na,,b\nc,none,d\n")
    data = load(tmp_path / "d.csv", eval_size=0)
    assert list(data.train["prompt"]) == ["a\n\n", "c\n\nnone\n\n"]
    (tmp_path / "e.csv").write_text("text,note\na,1\n,2\n")
    with pytest.raises(ConfigError, match=r"row 2 .* column 'text' holds nothing"):
        load(tmp_path / "e.csv", eval_size=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text,label\n", "has no example; expected at least one"),
        ("text\ncaf\u00e9\n".encode("latin-1"), "is not written in UTF-8 .* save it in that"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"chat": [{"role": "user", "content": "a"}]}, {}, r"columns: \{messages: chat\}\.$"),
        (
            {"conversations": [{"from": "human", "value": "a"}]}, {},
            "an object of role and content; those of 'conversations' have 'from', 'value'",
        ),
        ({"text": "a"}, {"dataset_text_field": "body"}, "expected `body`;.* Remove dataset_text"),
        ({"txt": "a"}, {"dataset_text_field": "body"}, r"expected `body`;.*columns: \{text: txt\}"),
    ],
)  # fmt: skip
def test_columns_of_other_names_are_told_what_they_may_be(
    row: dict[str, object], settings: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(write_jsonl(tmp_path / "d.jsonl", [row] * 3), **settings)


def test_a_field_of_text_that_is_not_read_is_said(completion_file: Path, tmp_path: Path) -> None:
    data = load(completion_file, dataset_text_field="prompt")
    assert any("dataset_text_field is 'prompt', but" in said for said in data.said)
    assert not any("dataset_text_field" in said for said in load(completion_file).said)
    body = write_jsonl(tmp_path / "b.jsonl", [{"body": "a"}] * 3)
    said = load(body, dataset_text_field="body", eval_size=0).said
    assert not any("dataset_text_field" in text for text in said)
