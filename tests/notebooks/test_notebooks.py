"""Every notebook runs from the top, offline; what is committed is whole and names no folder."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from helpers_models import build_tiny_model, sentence, write_jsonl

from lisa_analysis.contract.paths import cache_dir

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDY = ROOT / "reports/2026-11-23-skew/runs"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Raised inside nbclient and jupyter_client.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def _load_execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = _load_execute()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Value of every parameter of every notebook: a tiny model, few steps, a folder to work in."""
    folder = tmp_path_factory.mktemp("notebooks")
    build_tiny_model(folder / "model", layers=8)
    (folder / "data").mkdir()
    for split, first in (("train", 0), ("test", 1000)):
        rows = [{"text": sentence(n)} for n in range(first, first + 60)]
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    return {
        "MODEL": str(folder / "model"),
        "DATA": str(folder / "data"),
        "STEPS": 6,
        "WORK": str(folder / "work"),
        "PILOT": str(ROOT / "tests/data/golden-run"),  # eight layers, as the tiny model
        "STUDY": str(STUDY),
        "RUN": str(STUDY / "full-1"),
        "SMALL": str(ROOT / "tests/data/golden-run"),
        "OTHER": str(STUDY / "lora-1"),
        "LLAMA_LAYERS": 2,
        "DRAWS": 200,
    }


def parameter_cell(notebook: Any) -> Any:
    """The one cell tagged `parameters`."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    return cell


def parameters(notebook: Any) -> list[str]:
    """Names that the cell tagged `parameters` sets."""
    names = [n for n in ast.walk(ast.parse(parameter_cell(notebook).source))
             if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]  # fmt: skip
    return [name.id for name in names]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Runs one notebook after another in one kernel: what they import takes longer than they do."""
    empty = nbformat.v4.new_notebook()
    client = execute.client_of(empty, timeout=300)
    yield client
    client.nb = empty
    client.execute()  # and ends the kernel


@every_notebook
def test_the_notebook_runs_on_a_tiny_model(path: Path, small: dict[str, Any], client: Any) -> None:
    notebook = nbformat.read(path, as_version=4)
    lines = [f"{name} = {small[name]!r}" for name in parameters(notebook)]
    parameter_cell(notebook).source = "\n".join(lines)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client.nb = notebook
    client.execute(cleanup_kc=False)
    for cell in notebook.cells:
        if "lt.train(" in cell.source:  # the bar and the curve that training shows
            pages = [o.data["text/html"] for o in cell.outputs if "data" in o]
            assert any("<progress" in page and "<polyline" in page for page in pages)


@pytest.mark.slow
@every_notebook
def test_the_notebook_runs_on_the_real_model(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    needed = ("SmolLM2-135M-Instruct/config.json", "chitchat/test.jsonl")
    if "MODEL" in parameters(notebook):
        for name in needed:
            if not (cache_dir() / name).is_file():
                pytest.skip(f"{name} is not in {cache_dir()}: run `make demo` once to fetch it")
    parameter_cell(notebook).source += f"\nWORK = {str(tmp_path / 'work')!r}"
    execute.execute(notebook)


@every_notebook
def test_the_committed_outputs_are_whole(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|Users|tmp|work)/|site-packages|Warning:", text)
    assert path.stat().st_size < 1_000_000


def test_folders_and_the_stream_of_errors_stay_out_of_the_outputs() -> None:
    home, root = Path.home(), execute.HERE.parent
    shown = nbformat.v4.new_output(
        "execute_result", {"text/plain": f"{home}/models/m", "text/html": f"<p>{root}/runs/a</p>"}
    )
    printed = nbformat.v4.new_output("stream", name="stderr", text="noise\nmore\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[shown, printed])])
    assert execute.tidy(notebook) == ["noise", "more"]
    (kept,) = notebook.cells[0].outputs
    assert kept.data == {"text/plain": "~/models/m", "text/html": "<p>runs/a</p>"}
