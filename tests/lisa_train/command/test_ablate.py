"""`lisa-ablate` on whole runs: what is written and printed, what is refused, layers put back."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_models import sentence, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lisa_train as lt
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.schema import ABLATION, ABLATION_UNFINISHED
from lisa_train.command.ablate import main
from lisa_train.command.training import train
from lisa_train.config import LisaConfig, TrainConfig

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_length": 24,
    "eval_size": 12, "progress_bar": False,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}},
    "lisa": {"lisa": LisaConfig(activated_layers=1, interval_steps=2)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, text_file):
    """A finished run of every method; tests work on copies."""
    folder = tmp_path_factory.mktemp("runs")
    for method, extra in METHODS.items():
        train(
            TrainConfig(
                str(tiny_model_dir), str(text_file), method=method,
                output_dir=str(folder / method), **{**SETTINGS, **extra},
            )
        )  # fmt: skip
    return folder


@pytest.fixture
def run_of(runs, tmp_path):
    def copy(method: str) -> Path:
        return Path(shutil.copytree(runs / method, tmp_path / method))

    return copy


def frame(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / ABLATION)


def by_hand(model: Any, run: Path, tokenizer: Any, texts: list[str]) -> list[float]:
    """Loss of every text alone, summed over its labels."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=24)["input_ids"]])
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_ablated(method, run_of, tiny_model_dir, capsys, tmp_path):
    run = run_of(method)
    (tmp_path / "general.txt").write_text("\n\n".join(sentence(n) for n in range(90, 97)))
    before = sorted(p.name for p in run.iterdir())
    assert main([str(run), "--general", str(tmp_path / "general.txt")]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == sorted([*before, ABLATION])
    rows = frame(run)
    units = {str(i) for i in range(4)} | {"lora": set(), "full": {"embed", "norm"}}.get(
        method, {"embed", "norm"}
    )
    assert set(rows["unit"].dropna()) == units
    assert set(rows["mode"]) == {"trained", "base", "reset", "keep"}
    assert (rows.groupby(["data", "mode", "unit"], dropna=False).size() % 7 == 0).any()
    result = json.loads((run / "run.json").read_text())["result"]
    whole = rows[rows["unit"].isna() & (rows["data"] == "held_out")].groupby("mode")
    mean = whole["loss"].sum() / whole["tokens"].sum()
    assert mean["base"] == pytest.approx(result["first_held_out_loss"], rel=1e-4)
    assert mean["trained"] == pytest.approx(result["last_held_out_loss"], rel=1e-4)
    assert whole["example"].nunique()["base"] == 12
    general = rows[rows["unit"].isna() & (rows["data"] == "general")]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = [sentence(n) for n in range(90, 97)]
    np.testing.assert_allclose(
        general[general["mode"] == "base"].sort_values("example")["loss"],
        by_hand(base, run, tokenizer, texts),
        rtol=1e-5,
    )
    assert f"held-out loss {mean['base']:.4f} → {mean['trained']:.4f}" in printed
    assert "12 of 12 examples" in printed
    assert "taken out costs" in printed
    assert str(run / ABLATION) in printed
    if method == "lisa":  # a layer that was never drawn learned nothing
        drawn = json.loads((run / "run.json").read_text())["result"]["layer_visits"]
        for layer, visits in enumerate(drawn):
            mine = rows[(rows["unit"] == str(layer)) & (rows["data"] == "held_out")]
            same = mine[mine["mode"] == "reset"]["loss"].to_numpy() == (
                rows[(rows["mode"] == "trained") & (rows["data"] == "held_out")]["loss"].to_numpy()
            )
            assert same.all() == (visits == 0)


def test_later_calls_add_rows_and_measure_nothing_twice(run_of, monkeypatch):
    run = run_of("lora")
    first = lt.ablate(run, general=False, max_examples=5, progress=False)
    again = lt.ablate(run, general=False, max_examples=5, progress=False)
    assert first.cost.passes > 3
    assert again.cost.passes == 0
    assert "Everything was measured before" in str(again)
    before = frame(run)
    more = lt.ablate(run, general=False, max_examples=5, by="kind", ranges=["0-1"], progress=False)
    after = frame(run)
    assert set(after["kind"].dropna()) == {"attn.q", "mlp.down"}
    assert "0-1" in set(after["unit"])
    kept = after.merge(before, how="inner")
    assert len(kept) == len(before)
    assert [str(u.unit) for u in more.summary.units][:2] == ["0 attn.q", "0 mlp.down"]
    assert set(after["example"]) == set(range(5))


def test_an_interrupted_call_goes_on(run_of, monkeypatch, capsys):
    from lisa_train.measure.ablation.file import AblationFile

    run, whole = run_of("full"), run_of("lora").parent / "whole"
    shutil.copytree(run, whole)
    call = ["--general", "none", "--max_examples", "6"]
    add, left = AblationFile.add, [5]

    def some(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, *args)

    monkeypatch.setattr(AblationFile, "add", some)
    assert main([str(run), *call]) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert (run / ABLATION_UNFINISHED).exists()
    assert not (run / ABLATION).exists()
    monkeypatch.setattr(AblationFile, "add", add)
    assert main([str(run), *call]) == 0
    assert "goes on where an interrupted call stopped" in capsys.readouterr().err
    assert main([str(whole), *call]) == 0
    assert "goes on" not in capsys.readouterr().err
    pd.testing.assert_frame_equal(frame(run), frame(whole))
    assert not (run / ABLATION_UNFINISHED).exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_are_put_back(method, run_of, tiny_model_dir, tmp_path, capsys):
    run, out = run_of(method), tmp_path / "restored"
    lt.ablate(run, general=False, ranges=["1-2"], progress=False)
    rows = frame(run)
    wanted = rows[(rows["unit"] == "1-2") & (rows["mode"] == "reset")]
    call = [str(run), "--restore", "1-2", "--output", str(out), "--general", "none"]
    assert main(call) == 0
    printed = capsys.readouterr().out
    mean = wanted["loss"].sum() / wanted["tokens"].sum()
    assert f"with these put back {mean:.4f}" in printed
    assert json.loads((out / "restored.json").read_text())["put_back"] == ["1", "2"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(out)
        start, final = (
            base.state_dict(),
            AutoModelForCausalLM.from_pretrained(run / "checkpoints/final").state_dict(),
        )
        for name, tensor in loaded.state_dict().items():
            back = name.startswith(("model.layers.1.", "model.layers.2."))
            assert torch.equal(tensor, (start if back else final)[name]), name
        assert (out / "tokenizer.json").exists()
    else:
        assert "model.layers.1" not in " ".join(
            n for n, _ in PeftModel.from_pretrained(base, str(out)).named_parameters()
            if "lora" in n
        )  # fmt: skip
    shutil.rmtree(run / ("adapter" if method == "lora" else "checkpoints"))
    (run / ABLATION).unlink()
    whole = lt.ablate(run, general=False, model=out, progress=False)
    assert whole.summary.losses["held_out"][1] == pytest.approx(mean, rel=1e-6)
    after = frame(run)
    got = after[(after["mode"] == "trained")].sort_values("example")["loss"].to_numpy()
    assert np.array_equal(got, wanted.sort_values("example")["loss"].to_numpy())


def test_the_layers_that_the_table_proposes_are_put_back(run_of, tmp_path, capsys):
    """Layer 1 is made to cost much on general text, and to help nowhere; the others as measured."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run, out = run_of("lora"), tmp_path / "restored"
    general = ["--general", str(tmp_path / "general.txt")]
    (tmp_path / "general.txt").write_text("\n\n".join(sentence(n) for n in range(90, 97)))
    assert main([str(run), *general]) == 0
    table = pq.read_table(run / ABLATION)
    rows = table.to_pandas()
    mine = (rows["unit"] == "1") & (rows["mode"] == "reset")
    rows.loc[mine, "loss"] -= rows.loc[mine, "tokens"] * np.where(
        rows.loc[mine, "data"] == "general", 5.0, 0.1
    )
    at = table.column_names.index("loss")
    pq.write_table(table.set_column(at, "loss", pa.array(rows["loss"])), run / ABLATION)
    capsys.readouterr()
    assert main([str(run), *general]) == 0
    printed = capsys.readouterr().out
    marked = [x.split()[0] for x in printed.splitlines() if x.endswith("put back?")]
    assert "1" in marked
    assert f"--restore {','.join(marked)} --output" in printed
    assert main([str(run), *general, "--restore", "auto", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert json.loads((out / "restored.json").read_text())["put_back"] == marked
    assert "of the gain stays" in printed
    card = (out / "README.md").read_text()
    assert card.startswith((run / "adapter/README.md").read_text().rstrip())
    assert f"- Put back: {', '.join(marked)}\n- held-out loss: base" in card


def test_quiet_prints_where_the_file_is_and_nothing_else(run_of, tmp_path, capsys):
    run, out = run_of("lora"), tmp_path / "restored"
    few = ["--general", "none", "--max_examples", "2"]
    assert main([str(run), *few, "--quiet"]) == 0
    assert capsys.readouterr() == (f"{run / ABLATION}\n", "")
    assert main([str(run), *few, "-q", "--restore", "1", "--output", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert (out / "restored.json").exists()


def test_verbose_shows_where_a_refusal_comes_from(tmp_path, capsys):
    assert main([str(tmp_path / "gone"), "-v"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.rstrip().splitlines()[-1].startswith("lisa-ablate: ")
    assert main([str(tmp_path / "gone"), "-q"]) == 2  # what is refused is said all the same
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "gone"), "-q", "-v"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_somebody_elses_run(tmp_path, tiny_model_dir):
    """A Trainer with `attach`: model and examples are handed over."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rows = [{"input_ids": torch.arange(6 + n % 2) + n} for n in range(8)]
    rows = [{**row, "labels": row["input_ids"].clone()} for row in rows]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", per_device_train_batch_size=1, learning_rate=1e-2,
        ),
        train_dataset=rows,
    )  # fmt: skip
    lt.attach(trainer, record=lt.RecordConfig(str(tmp_path / "run")))
    trainer.train()
    with pytest.raises(LisaError, match=r"does not say what it was trained from.*--base"):
        lt.ablate(tmp_path / "run", data=rows, model=model)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    model.train()
    found = lt.ablate(tmp_path / "run", data=rows, model=model, base=tiny_model_dir, progress=False)
    assert model.training
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    assert found.summary.forgetting is None
    with torch.no_grad():
        expected = [float(model.eval()(**{k: v[None] for k, v in r.items()}).loss) for r in rows]
    table = frame(tmp_path / "run")
    got = table[table["mode"] == "trained"].sort_values("example")
    np.testing.assert_allclose(got["loss"] / got["tokens"], expected, rtol=1e-5)


def test_a_data_set_and_the_shipped_text(run_of, tmp_path):
    run = run_of("lora")
    data = write_jsonl(tmp_path / "other.jsonl", [{"text": sentence(n)} for n in range(300, 305)])
    found = lt.ablate(run, data=str(data), max_examples=None, progress=False)
    assert found.summary.data["held_out"]["examples"] == 5
    assert found.summary.data["general"]["available"] == 64
    assert "public domain" in found.summary.data["general"]["name"]
    assert found.summary.forgetting is not None


def test_a_held_out_split_that_other_data_lack_is_not_asked_of_them(run_of, tmp_path):
    """Nor of the run's own, of before such a name was refused: a share of them was held out."""
    run = run_of("lora")
    path = run / "config.yaml"
    text = path.read_text()
    assert "dataset_test_split: test\n" in text
    path.write_text(text.replace("dataset_test_split: test\n", "dataset_test_split: validaton\n"))
    data = write_jsonl(tmp_path / "other.jsonl", [{"text": sentence(n)} for n in range(300, 305)])
    for given, examples in ((str(data), 5), (None, SETTINGS["eval_size"])):
        found = lt.ablate(run, data=given, general=False, max_examples=None, progress=False)
        assert found.summary.data["held_out"]["examples"] == examples
        (run / ABLATION).unlink()


def read_base(run: Path) -> str:
    """Where the adapter of a run says that its base is."""
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    return str(settings["base_model_name_or_path"])


def damaged(run: Path, what: str) -> list[str]:
    """A command line that cannot be done."""
    config = run / "config.yaml"
    if what == "no weights":
        shutil.rmtree(run / "adapter")
    elif what == "base gone":
        text = config.read_text().splitlines()
        changed = [x if "model_name_or_path" not in x else "model_name_or_path: /no/where/tiny"
                   for x in text]  # fmt: skip
        config.write_text("\n".join(changed))
    elif what == "no base in hub":
        return [str(run), "--base", "nobody/none"]
    elif what == "other columns":
        write_jsonl(run.parent / "columns.jsonl", [{"question": "a", "answer": "b"}])
        return [str(run), "--data", str(run.parent / "columns.jsonl")]
    elif what == "another adapter":
        path = run / "adapter/adapter_config.json"
        settings = json.loads(path.read_text())
        settings["target_modules"] = ["nothing_of_this_name"]
        path.write_text(json.dumps(settings))
    elif what == "a larger model's adapter":
        from safetensors.torch import load_file, save_file

        path = run / "adapter/adapter_model.safetensors"
        wider = {n: torch.cat([t, t], -1) if ".lora_A." in n else t
                 for n, t in load_file(path).items()}  # fmt: skip
        save_file(wider, path, {"format": "pt"})
    elif what == "a smaller base":
        from transformers import AutoConfig

        smaller = AutoConfig.from_pretrained(read_base(run), intermediate_size=40)
        other = run.parent / "smaller"
        AutoModelForCausalLM.from_config(smaller).save_pretrained(other)
        for file in Path(read_base(run)).glob("*token*"):
            shutil.copy(file, other)
        return [str(run), "--base", str(other)]
    elif what == "a probe":
        path = run / "run.json"
        path.write_text(path.read_text().replace('"method": "lora"', '"method": "probe"'))
    elif what == "range":
        return [str(run), "--range", "5"]
    elif what == "ranges":
        return [str(run), "--range", "1-9"]
    elif what == "no output":
        return [str(run), "--restore", "1"]
    elif what == "no layer":
        return [str(run), "--restore", "9", "--output", str(run.parent / "out")]
    elif what == "taken":
        return [str(run), "--restore", "1", "--output", str(run)]
    elif what == "auto":
        return [str(run), "--restore", "auto", "--output", str(run.parent / "out")]
    elif what == "examples":
        return [str(run), "--max_examples", "1"]
    elif what == "number":
        return [str(run), "--max_examples", "many"]
    elif what == "empty text":
        (run.parent / "empty.txt").write_text("\n\n")
        return [str(run), "--general", str(run.parent / "empty.txt")]
    elif what == "text gone":
        return [str(run), "--general", str(run.parent / "gone.txt")]
    elif what == "no run":
        return [str(run.parent / "nothing")]
    return [str(run)]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no weights", "holds no trained weights, neither adapter/ nor .*save_final_model"),
        ("base gone", "/no/where/tiny of .* no folder here: name it with --base"),
        ("no base in hub", "nobody/none of .* not in this machine's cache .*--base"),
        ("other columns", "has the columns 'answer', 'question'|has the columns 'question', 'ans"),
        ("another adapter", "does not fit the base .*it is another model's"),
        ("a larger model's adapter", "does not fit the base .*size mismatch.*another model's"),
        ("a smaller base", "does not fit the base .*smaller .*size mismatch.*another model's"),
        ("a probe", "is a probe, which trains nothing"),
        ("range", "range is 5; expected a number of layers from 2 to 4"),
        ("ranges", "range '1-9' is none of the model's 4 layers, 0 to 3"),
        ("no output", "--restore needs --output DIR beside it"),
        ("no layer", "'9' is no layer .0 to 3. and no group"),
        ("taken", "--output .* holds something already"),
        ("auto", "does not tell which layers to put back: run lisa-ablate"),
        ("examples", "max_examples is 1, but must be a whole number of at least 2"),
        ("number", "--max_examples is 'many'"),
        ("empty text", "empty.txt is empty"),
        ("text gone", "gone.txt"),
        ("no run", "nothing does not exist: give the run directory"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(what, says, run_of, capsys):
    import re

    run = run_of("lora")
    call = damaged(run, what)
    before = {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}
    assert main(call) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [x for x in printed.err.splitlines() if x.startswith("lisa-ablate: ")]
    assert len(lines) == 1, printed.err
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in printed.err
    assert {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()} == before


def test_a_run_that_is_being_trained(run_of, capsys):
    from lisa_train.measure.disk.storage import RunLock

    run = run_of("lora")
    path = run / "run.json"
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "running"'))
    lock = RunLock(run / "run.lock")
    before = {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}
    put_back = ["--restore", "1", "--output", str(run.parent / "out")]
    try:
        for call in ([str(run)], [str(run), *put_back]):
            assert main(call) == 2
            assert "being trained at the moment: wait" in capsys.readouterr().err
    finally:
        lock.release()
    assert {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()} == before


def test_a_run_directory_that_cannot_be_written(run_of, capsys, monkeypatch):
    """Nothing is measured there, in one sentence; layers are put back: that goes elsewhere."""
    from lisa_train.measure.disk import storage

    run, opened = run_of("lora"), os.open

    def refuse(path, flags, *args, **more):
        if str(path).startswith(str(run)) and flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **more)

    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    out = run.parent / "put-back"
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", refuse)  # the tests may run as root, who may write
        assert main([str(run)]) == 2
        said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lisa-ablate: ")]
        assert len(said) == 1
        assert f"{run} cannot be written (Read-only file system)" in said[0]
        assert main([str(run), "--restore", "1", "--output", str(out), "--general", "none"]) == 0
    assert (out / "adapter_model.safetensors").exists()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_another_base_of_the_same_shape_is_told_by_its_losses(run_of, tmp_path, tiny_model_dir):
    """Nothing in the weights tells it; its first loss does not fit what the run recorded."""
    run = run_of("full")
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    lt.ablate(run, general=False, progress=False)
    with pytest.raises(LisaError, match="was measured with base"):
        lt.ablate(run, general=False, base=tmp_path / "other", progress=False)
