"""Before the first step: what does not fit is one sentence, a fault of ours is a traceback."""

import json
import math
import shutil
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers_models import sentence, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
)

import lisa_analysis as la
from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.cli import main
from lisa_train.command.starting import refusals
from lisa_train.command.training import train
from lisa_train.config import RecordConfig, TrainConfig

TAKE_TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{{ m['content'] }}</s>{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
)


def config(model: Path, data: Path, out: Path, **settings: Any) -> TrainConfig:
    fast: dict[str, Any] = {
        "method": "full", "max_steps": 1, "per_device_train_batch_size": 2, "progress_bar": False,
        "save_final_model": False, "eval_size": 0, "record": RecordConfig(every=1),
    }  # fmt: skip
    return TrainConfig(str(model), str(data), output_dir=str(out), **{**fast, **settings})


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    roles = {"u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[t[0]], "content": t[1:]} for t in turns], **more}


@pytest.fixture
def with_template(tiny_model_dir: Path, tmp_path: Path):
    """The tiny model with another chat template."""

    def make(template: str | None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def refused(settings: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        train(settings)
    message = str(caught.value)
    assert "\n" not in message
    assert settings.output_dir is not None
    assert not Path(settings.output_dir).exists()
    return message


# ------------------------------------------------------------------ rows


def test_a_template_that_raises_is_quoted_with_the_row(with_template, tmp_path: Path) -> None:
    rows = [chat("uone", "atwo"), chat("uone", "utwo", "athree"), chat("ux", "ay")]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    message = refused(config(with_template(TAKE_TURNS), data, tmp_path / "run"))
    assert message.startswith(f"row 2 of split 'train' of {data}")
    assert message.endswith("the chat template refuses it: roles must take turns.")


def test_the_row_is_the_one_of_the_file_when_others_are_held_out(
    with_template, tmp_path: Path
) -> None:
    """Whatever part the row falls into, and wherever it stands there."""
    rows = [chat("uone", "atwo") for _ in range(20)]
    model = with_template(TAKE_TURNS)
    for bad in (3, 11):
        changed = [chat("uone", "utwo") if n == bad else row for n, row in enumerate(rows)]
        data = write_jsonl(tmp_path / f"d{bad}.jsonl", changed)
        message = refused(config(model, data, tmp_path / "run", eval_size=8))
        assert message.startswith(f"row {bad + 1} of split 'train'")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "with at least one; it holds '[]'"),
        ({"messages": None}, "it holds 'None'"),
        ({"messages": [{"role": None, "content": "x"}]}, "has the role None"),
        ({"messages": [{"role": "user", "content": None}]}, "has the content None"),
        (chat("uq", "aw", tools="{no json"), "text that is no JSON"),
    ],
)
def test_a_later_row_that_is_no_conversation_is_named(
    row: dict[str, Any], words: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    good = chat("uone", "atwo", tools="[]") if "tools" in row else chat("uone", "atwo")
    data = write_jsonl(tmp_path / "d.jsonl", [good] * 4 + [row] + [good] * 3)
    message = refused(config(tiny_model_dir, data, tmp_path / "run"))
    assert message.startswith(f"row 5 of split 'train' of {data}")
    assert words in message


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"text": "a b"}, {"text": None}, "'text' holds nothing (null); expected text"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "'completion'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "'completion' holds nothing"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5], "labels": [5, 6]}, "each of"),
        ({"input_ids": [5, 6]}, {"input_ids": []}, "must be a list of token ids"),
    ],
)
def test_a_later_row_of_another_kind_is_named(
    good: dict[str, Any], bad: dict[str, Any], words: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [good, good, bad, good])
    message = refused(config(tiny_model_dir, data, tmp_path / "run"))
    assert message.startswith(f"row 3 of split 'train' of {data}")
    assert words in message


def test_a_test_split_without_the_column_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    datasets.DatasetDict(
        train=datasets.Dataset.from_list([{"text": "a b"}]),
        test=datasets.Dataset.from_list([{"txt": "a b"}]),
    ).save_to_disk(folder)
    message = refused(config(tiny_model_dir, folder, tmp_path / "run"))
    assert "split 'test'" in message
    assert "no column 'text'" in message


# ------------------------------------------------------------------ columns


def trained_text(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every row that the trainer is given."""
    import lisa_train.command.tasks.text as module

    seen = {}
    original = module.build_trainer

    def build(*args: Any) -> Any:
        seen["trainer"] = original(*args)
        return seen["trainer"]

    monkeypatch.setattr(module, "build_trainer", build)
    train(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path)
    return [tokenizer.decode(ids) for ids in seen["trainer"].train_dataset["input_ids"]]


@pytest.mark.parametrize("completion_only", [None, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_arguments_arrive(
    completion_only: bool | None,
    as_text: bool,
    with_template,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = with_template(TOOLS)
    tools = [
        [{"type": "function", "function": {"name": f"tide_{n}", "parameters": {f"p{n}": "string"}}}]
        for n in range(3)
    ]
    rows = [
        chat("uhigh water", "aat noon", tools=json.dumps(t) if as_text else t,
             chat_template_kwargs={"mood": f"calm {n}"}, source="me", rating=3)
        for n, t in enumerate(tools)
    ]  # fmt: skip
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    settings = config(model, data, tmp_path / "run", completion_only_loss=completion_only)
    found = trained_text(settings, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = [
        tokenizer.apply_chat_template(row["messages"], tools=t, mood=f"calm {n}", tokenize=False)
        for n, (row, t) in enumerate(zip(rows, tools, strict=True))
    ]
    assert sorted(found) == sorted(expected)
    described = json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]
    assert described["unused_columns"] == ["rating", "source"]
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert notes == [f"note: nothing reads the columns 'rating', 'source' of {data}."]


@pytest.mark.parametrize("mask", ["labels", "completion_mask", "assistant_masks"])
def test_token_ids_arrive_with_their_masks(mask: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The loss of step 1 is that of the last two tokens alone, in float64."""
    ids = [[7, 30, 41, 52, 63], [9, 31, 12, 53, 14]]
    keep = [0, 0, 0, 1, 1]
    labels = [[i if k else -100 for i, k in zip(x, keep, strict=True)] for x in ids]
    masks = labels if mask == "labels" else [keep, keep]
    rows = [{"input_ids": x, mask: m} for x, m in zip(ids, masks, strict=True)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    only = True if mask == "completion_mask" else None
    run_dir = train(config(tiny_model_dir, data, tmp_path / "run", completion_only_loss=only))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    batch = torch.tensor(ids)
    log_p = torch.log_softmax(model(batch).logits, dim=-1)
    losses = [-log_p[r, p - 1, batch[r, p]].item() for r in (0, 1) for p in (3, 4)]
    assert la.load(run_dir).scalars["loss"].iloc[0] == pytest.approx(np.mean(losses), rel=1e-5)


# ------------------------------------------------------------------ lengths, labels, batches


def test_run_json_counts_what_is_left_after_cutting(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(sentence(n) for n in range(20))
    rows = [{"prompt": long if n % 3 == 0 else "the", "completion": " fox"} for n in range(12)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    run_dir = train(config(tiny_model_dir, data, tmp_path / "run", max_length=16))
    described = json.loads((run_dir / "run.json").read_text())["dataset"]
    assert (described["train_examples"], described["dropped_examples"]) == (8, 4)
    assert f"note: 4 training examples of {data} are dropped" in capsys.readouterr().err


def test_what_is_held_out_in_the_place_of_a_split_is_said(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tiny_model_dir, text_file, tmp_path / "run", eval_size=4))
    said = capsys.readouterr().err
    assert f"note: {text_file} has no split 'test': 4 examples of split 'train'" in said


def test_conversations_without_an_answer_are_counted_as_dropped(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [chat("uone", "atwo") if n % 4 else chat("uone") for n in range(12)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    run_dir = train(config(tiny_model_dir, data, tmp_path / "run", completion_only_loss=True))
    described = json.loads((run_dir / "run.json").read_text())["dataset"]
    assert (described["train_examples"], described["dropped_examples"]) == (9, 3)


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_left_to_learn_from_is_refused(
    packing: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    long = " ".join(sentence(n) for n in range(20))
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": long, "completion": " fox"}] * 6)
    settings = config(tiny_model_dir, data, tmp_path / "run", max_length=16, packing=packing)
    assert "beyond max_length 16; raise it" in refused(settings)


def test_batches_without_a_label_have_no_loss_and_weigh_nothing(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Every second row is empty: its loss is null; held-out losses are those of the other rows."""
    texts = ["" if n % 2 else sentence(n) for n in range(24)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", [{"text": t} for t in texts])
    run_dir = train(
        config(
            tiny_model_dir, folder, tmp_path / "run", max_steps=24, learning_rate=0.0,
            per_device_train_batch_size=1, per_device_eval_batch_size=1,
        )
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    per_row, total, count = [], 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text + "</s>")["input_ids"]])
        log_p = torch.log_softmax(model(ids).logits, dim=-1)[0]
        losses = [-log_p[p - 1, ids[0, p]].item() for p in range(1, ids.shape[1])]
        total, count = total + sum(losses), count + len(losses)
        per_row.append(np.mean(losses) if losses else None)
    run = la.load(run_dir)
    found = run.scalars["loss"]
    assert found.isna().sum() == 12
    expected = sorted(x for x in per_row if x is not None)
    assert sorted(found.dropna()) == pytest.approx(expected, rel=1e-5)
    lines = [json.loads(x) for x in (run_dir / "scalars.jsonl").read_text().splitlines()]
    assert sum("loss" not in line for line in lines) == 12
    held_out = run.events["metrics"].dropna().iloc[0]["eval_loss"]
    assert held_out == pytest.approx(total / count, rel=1e-5)
    assert run.manifest["dataset"]["examples_without_labels"] == 12
    assert la.diagnose(run).findings  # the analysis takes the gaps


@pytest.mark.parametrize("steps", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 2.0}])
def test_no_batch_is_refused(
    steps: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": sentence(n)} for n in range(3)])
    settings = config(
        tiny_model_dir, data, tmp_path / "run", per_device_train_batch_size=8,
        trainer_args={"dataloader_drop_last": True}, **steps,
    )  # fmt: skip
    message = refused(settings)
    assert "3 training examples" in message
    assert "dataloader_drop_last" in message
    words = [f"--model_name_or_path={tiny_model_dir}", f"--dataset_name={data}", "--method=full",
             "--eval_size=0", "--trainer_args.dataloader_drop_last=true",
             f"--output_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err
    held = write_jsonl(tmp_path / "e.jsonl", [{"text": sentence(n)} for n in range(11)])
    settings = config(
        tiny_model_dir, held, tmp_path / "run", per_device_train_batch_size=8, eval_size=3,
        trainer_args={"dataloader_drop_last": True}, **steps,
    )  # fmt: skip
    assert "3 held-out examples" in refused(settings)


# ------------------------------------------------------------------ the model


def test_a_token_beyond_the_vocabulary_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the zebra"}, {"text": "the fox"}])
    message = refused(config(folder, data, tmp_path / "run"))
    assert f"token id {size} of" in message
    assert f"embedding has {size} rows" in message
    data = write_jsonl(tmp_path / "e.jsonl", [{"input_ids": [1, 10_000]}])
    assert "token id 10000 of" in refused(config(tiny_model_dir, data, tmp_path / "run"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 5, -7, 8]}, "token id -7 of"),
        ({"input_ids": [1, 5, 6], "labels": [-100, 5, 10_000]}, "label 10000 of"),
        ({"input_ids": [1, 5, 6], "labels": [-1, -1, 6]}, "-100 where nothing is to be learned"),
    ],
)
def test_token_ids_and_labels_that_are_no_tokens_are_refused(
    row: dict[str, list[int]], says: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A label beyond the logits has a loss, which is that of a logit of 0, on a CPU."""
    rows = [{"input_ids": [1, 5, 6]} | ({"labels": [-100, 5, 6]} if "labels" in row else {})] * 9
    data = write_jsonl(tmp_path / "d.jsonl", [*rows, row])
    assert says in refused(config(tiny_model_dir, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_rows_whose_labels_are_all_masked_are_not_called_too_long(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    row = {"input_ids": [1, 5, 6], "labels": [-100, -100, -100]}
    data = write_jsonl(tmp_path / "d.jsonl", [row] * 9)
    assert "every label is masked" in refused(config(tiny_model_dir, data, tmp_path / "run"))


def test_a_padding_token_beyond_the_vocabulary_is_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "the fox"}, {"text": "the quick fox"}])
    assert "padding token id" in refused(config(folder, data, tmp_path / "run"))


def test_rows_longer_than_a_table_of_positions_are_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": " ".join(["fox"] * 140)}] * 2)
    run_dir = train(config(tiny_model_dir, data, tmp_path / "rotary"))  # 128, but rotary
    assert la.load(run_dir).status == "finished"
    assert "has 128 positions (max_position_embeddings)" in capsys.readouterr().err
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model_dir, folder)
    for old in ("config.json", "model.safetensors"):
        (folder / old).unlink()
    size = len(AutoTokenizer.from_pretrained(folder))
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    assert "set max_length to at most 32" in refused(config(folder, data, tmp_path / "run"))
    assert train(config(folder, data, tmp_path / "fits", max_length=32)).exists()


def test_a_tokenizer_without_what_the_data_need_is_refused(
    with_template, text_file: Path, chat_file: Path, tmp_path: Path
) -> None:
    folder = with_template(None)
    message = refused(config(folder, chat_file, tmp_path / "run"))
    assert "no chat template; set trainer_args.chat_template_path" in message
    path = folder / "tokenizer_config.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if "_token" not in k}
    path.write_text(json.dumps(content))
    assert "no end-of-sequence token" in refused(config(folder, text_file, tmp_path / "run"))
    data = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [3, 4]}])
    assert "no padding token" in refused(config(folder, data, tmp_path / "run"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_torn_model_is_one_sentence(
    name: str, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:100])
    words = "cannot be read" if name == "config.json" else "cannot be loaded"
    assert words in refused(config(folder, text_file, tmp_path / "run"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": "adamw_nonsense"}, "refuses these settings"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "Training cannot begin"),
        ({"trainer_args": {"dataset_num_proc": -1}}, "refuses this combination"),
        ({"attn_implementation": "nonsense"}, "cannot be loaded"),
    ],
)
def test_what_a_library_refuses_is_one_sentence(
    settings: dict[str, Any],
    words: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        train(config(tiny_model_dir, text_file, tmp_path / "run", **settings))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ whose fault it is


def test_our_own_faults_come_through(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In code that we call, in code that a library calls back, and in a callback."""
    settings = config(tiny_model_dir, text_file, tmp_path / "run")
    for target in (
        "lisa_train.command.tasks.prepared.check_prepared",
        "lisa_train.command.tasks.data.split_parts",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, _faulty)
            with pytest.raises(AttributeError, match="no_such_name"):
                train(settings)
    with monkeypatch.context() as patch:
        patch.setattr("lisa_train.trainer.progress.FirstStep.on_train_begin", _faulty)
        with pytest.raises(AttributeError, match="no_such_name"):
            train(settings)


def _raise(*args: Any, **kwargs: Any) -> Any:
    return math.no_such_name  # type: ignore[attr-defined]


# As if it stood in a module of ours.
_faulty = types.FunctionType(_raise.__code__, {"math": math, "__name__": "lisa_train.planted"})


def test_who_raised_it_decides() -> None:
    data = datasets.Dataset.from_list([{"a": 1}])
    with pytest.raises(ConfigError, match="no: TypeError in json: "), refusals("no: {}".format):
        json.loads(3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), refusals("no: {}".format):
        data.map(_faulty)


def test_what_a_library_raises_below_a_patch_of_ours_is_one_sentence(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation goes through the trainer's patched methods; nothing of ours failed."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        return math.no_such_name  # type: ignore[attr-defined]

    theirs = types.FunctionType(fail.__code__, {"math": math, "__name__": "torch.planted"})
    monkeypatch.setattr("trl.SFTTrainer.compute_loss", theirs)
    with pytest.raises(ConfigError, match="Training cannot begin: AttributeError in torch"):
        train(config(tiny_model_dir, text_file, tmp_path / "run", eval_size=2))


class _Late(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("later")


def test_after_the_first_step_errors_stay_what_they_are(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lisa_train.command.tasks.text as module

    original = module.build_trainer

    def build(*args: Any) -> Any:
        trainer = original(*args)
        trainer.add_callback(_Late())
        return trainer

    monkeypatch.setattr(module, "build_trainer", build)
    with pytest.raises(RuntimeError, match="later"):
        train(config(tiny_model_dir, text_file, tmp_path / "run"))
    assert la.load(tmp_path / "run").status == "failed"
