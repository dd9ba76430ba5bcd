"""README.md: its tables are those of the schema, and its code runs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lisa_analysis.contract import schema

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = {
    "layout": schema.layout_to_markdown(),
    "metrics": schema.to_markdown(schema.METRICS_TABLE),
    "probes": schema.to_markdown(schema.PROBES_TABLE),
    "ablation": schema.to_markdown(schema.ABLATION_TABLE),
    "scalars": schema.to_markdown(schema.SCALARS_TABLE),
}


def blocks(language: str) -> list[str]:
    """Fenced code blocks with exactly this info string."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone from inside, so that nothing lands in this one."""
    (tmp_path / "tests" / "data").mkdir(parents=True)
    shutil.copytree(ROOT / "tests/data/golden-run", tmp_path / "tests/data/golden-run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_schema(name: str) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no section {name}"
    assert found[1].strip() == TABLES[name].strip(), "run: python tests/contract/test_readme.py"


def test_the_tour_in_the_shell_runs(clone: Path) -> None:
    from lisa_analysis.views.cli import main

    line = next(x for x in blocks("sh")[2].splitlines() if x.startswith("lisa-analyze tests/data"))
    assert main(line.split()[1:]) == 0
    assert (clone / "report.html").stat().st_size > 0
    assert (clone / "probabilities.json").stat().st_size > 0


def test_the_tour_in_python_runs(clone: Path) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (clone / "report.html").exists()


def test_every_command_line_of_the_loop_is_one_that_lisa_train_takes() -> None:
    from lisa_train.command.cli import parse

    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [x.split("#")[0].split() for x in text.splitlines() if x.startswith("lisa-train")]
    assert len(lines) >= 3
    for line in lines:
        if "runs/learned/config.yaml" not in line:
            assert parse(line[1:]).config.model_name_or_path == "MODEL"


def test_the_plain_loop_runs_and_trains_only_what_was_drawn() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(24).reshape(2, 12)
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "batches": [{"input_ids": ids, "labels": ids}] * 5,
    }
    exec(compile(blocks("python loop")[0], "README.md", "exec"), names)
    changed = {
        int(name.split(".")[2])
        for name, p in model.named_parameters()
        if name.startswith("model.layers.") and not torch.equal(p, before[name])
    }
    assert changed == {i for i, n in enumerate(names["engine"].visits) if n}
    assert len(changed) == 1


def test_the_line_for_somebody_elses_trainer_runs(clone: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import lisa_analysis as la

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    ids = torch.arange(12)
    arguments = TrainingArguments(
        str(clone / "out"), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids}] * 32
    trainer = Trainer(model, arguments, train_dataset=data)
    exec(compile(blocks("python trainer")[0], "README.md", "exec"), {"trainer": trainer})
    run = la.load("runs/mine")
    assert (run.status, run.method) == ("finished", "lisa")
    assert list(run.scalars["step"]) == [1, 2, 3]
    assert len(run.events.query("event == 'lisa_draw'")["layers"].iloc[0]) == 2


def ask_duckdb(code: str) -> list[tuple[int, int, float]]:
    import duckdb

    return duckdb.sql(code).fetchall()


def ask_polars(code: str) -> list[tuple[int, int, float]]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["norms"].rows()


def ask_pandas(code: str) -> list[tuple[int, int, float]]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return [(*key, value) for key, value in names["norms"].items()]


def resumed(folder: Path) -> str:
    """A run that was interrupted after step 3 and continued from step 1."""
    import numpy as np

    from lisa_train.measure.disk.writer import RunWriter

    table = [{"param_id": 0, "name": "model.layers.0.w", "layer": 0, "kind": "other",
              "role": "base", "numel": 4, "shape": "4", "dtype": "float32",
              "tied_to": None}]  # fmt: skip
    manifest = {
        "method": "full",
        "layers": [{"index": 0, "name": "model.layers.0", "stack": "model.layers"}],
    }

    def write(writer: RunWriter, steps: range, value: float) -> None:
        for step in steps:
            norm = np.array([value], dtype=np.float32)
            writer.write_metrics(
                {"step": np.array([step]), "param_id": np.array([0]), "grad_norm": norm}
            )

    writer = RunWriter(folder, manifest=manifest, parameters=table)
    write(writer, range(1, 4), 1.0)
    writer.close("interrupted")
    writer = RunWriter(folder, manifest=manifest, parameters=table, resume=True, step=1)
    write(writer, range(2, 6), 2.0)
    writer.close()
    return str(folder)


@pytest.mark.parametrize("kind", ["golden", "resumed"])
@pytest.mark.parametrize(
    ("language", "ask"),
    [("sql duckdb", ask_duckdb), ("python polars", ask_polars), ("python pandas", ask_pandas)],
)
def test_other_tools_read_what_the_library_reads(clone: Path, language, ask, kind) -> None:
    import numpy as np

    import lisa_analysis as la

    golden = "tests/data/golden-run"
    path = golden if kind == "golden" else resumed(clone / "resumed")
    rows = ask(blocks(language)[0].replace(golden, path))
    run = la.load(path)
    frame = run.metrics(columns=["grad_norm"]).dropna()
    frame["layer"] = frame["param_id"].map(run.parameters.set_index("param_id")["layer"])
    expected = (
        frame.dropna()
        .assign(square=lambda f: f["grad_norm"].astype(float) ** 2)
        .groupby(["layer", "step"])["square"]
        .sum()
    )
    assert len(rows) == len(expected) > 4
    for layer, step, value in rows:
        assert value == pytest.approx(np.sqrt(expected[layer, step]), rel=1e-5)


def write_tables() -> None:
    """Put the schema's tables into README.md."""
    text = README
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, table=table: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
