"""Execute the notebooks and rewrite their outputs, without the folders of this machine.

python notebooks/execute.py [01_quickstart.ipynb …]; all of them without a name.
"""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
# What libraries say about themselves is no part of a notebook.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    """Execute the notebooks named on the command line, or all."""
    names = sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb"))
    for path in (HERE / Path(name).name for name in names):
        notebook = nbformat.read(path, as_version=4)
        began = time.monotonic()
        execute(notebook)
        for line in tidy(notebook):
            print(f"  dropped: {line}", file=sys.stderr)
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)


def execute(notebook: Any, *, timeout: int = 1800) -> None:
    """Run a notebook from the top, in its own folder.

    Parameters
    ----------
    notebook
        A notebook of nbformat 4; its outputs are replaced.
    timeout
        Seconds that a cell may take.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell fails.
    """
    client_of(notebook, timeout).execute()


def client_of(notebook: Any, timeout: int) -> nbclient.NotebookClient:
    """Return what runs a notebook in its own folder, see `execute`."""
    os.environ.update(QUIET)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums that do not depend on the thread count
    return nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": HERE}},
        record_timing=False,
    )


def tidy(notebook: Any) -> list[str]:
    """Take this machine's folders and name, and what went to stderr, out of the outputs.

    Returns
    -------
    list[str]
        The lines of stderr that were dropped.
    """
    dropped: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                dropped += output.text.splitlines()
            else:
                kept.append(_anonymous(output))
        cell.outputs = kept
    return dropped


def _anonymous(value: Any) -> Any:
    """Replace folders and the host's name in every text of an output."""
    if isinstance(value, str):
        for found, written in _replacements():
            value = value.replace(found, written)
        return value
    if isinstance(value, list):
        return [_anonymous(item) for item in value]
    if isinstance(value, dict):
        return type(value)({key: _anonymous(item) for key, item in value.items()})
    return value


def _replacements() -> list[tuple[str, str]]:
    """Longest first: the repository may lie in the home folder."""
    pairs = [(f"{HERE.parent}/", ""), (f"{Path.home()}/", "~/")]
    if cache := os.environ.get("LISA_CACHE"):
        pairs.append((str(Path(cache).resolve()), "~/.cache/lisa-toolkit"))
    if len(platform.node()) > 3:
        pairs.append((platform.node(), "host"))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


if __name__ == "__main__":
    main()
