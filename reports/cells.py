"""Many runs of one plan: each once, several at a time, and on from where it stopped.

A study is a list of cells. A cell is one `lisa-train`, and perhaps `lisa-ablate`, whose log is kept
beside the study's page; what is kept is not made again, on any machine. Processes are kept warm:
importing torch takes longer than some of the runs.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import yaml

from lisa_analysis.contract.errors import LisaError

KEPT = ("config.yaml", "parameters.parquet", "scalars.jsonl", "events.jsonl")
ABLATION = "ablation.parquet"
TABLES = ("metrics", "probes")
TASKS_PER_PROCESS = 30  # then a fresh one: what libraries hold on to does not grow without end


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Parameters
    ----------
    name
        Its folder below the kept logs, as ``pos/lisa/strong-s3``.
    words
        Gives the words of `lisa-train`, without the folder, when all of `after` is kept.
    after
        Cells whose logs it reads.
    ablated
        Words of `lisa-ablate` on the run directory once it is trained; None leaves it out.
    """

    name: str
    words: Callable[[], Sequence[str]]
    after: tuple[str, ...] = ()
    ablated: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """What takes about as long: the cell without its last word."""
        return self.name.rsplit("/", 1)[0]


def run_cells(
    cells: Sequence[Cell],
    kept: Path,
    work: Path,
    *,
    jobs: int,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run what is not kept yet; return the names of what is still missing.

    Parameters
    ----------
    cells
        The plan; earlier ones first where there is a choice.
    kept
        Folder of the study's logs.
    work
        Folder that training writes to.
    jobs
        Runs at a time, one processor each.
    seconds
        Begin no further cell after so long; None goes on to the end.
    say
        Gets a line for every cell that ends.

    Raises
    ------
    LisaError
        When cells fail; the others are run first.
    """
    begun = time.monotonic()
    waiting = {cell.name: cell for cell in cells if not (kept / cell.name).exists()}
    if len({cell.name for cell in cells}) < len(cells):
        raise LisaError("two cells of the plan have one name.")
    total, failed, took = len(waiting), {}, {}
    running: dict[Future[float], Cell] = {}
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=TASKS_PER_PROCESS
    ) as pool:
        while True:
            over = seconds is not None and time.monotonic() - begun > seconds
            for cell in [] if over else _ready(waiting, kept, jobs - len(running)):
                del waiting[cell.name]
                run_dir = work / cell.name
                shutil.rmtree(run_dir, ignore_errors=True)  # one that was cut short
                run_dir.parent.mkdir(parents=True, exist_ok=True)
                future = pool.submit(_make, str(run_dir), tuple(cell.words()), cell.ablated)
                running[future] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                error = future.exception()
                if error is None:
                    took.setdefault(cell.kind, []).append(future.result())
                    keep(work / cell.name, kept / cell.name, study=kept.parent.name)
                    shutil.rmtree(work / cell.name)
                else:
                    failed[cell.name] = str(error)
                done = total - len(waiting) - len(running)
                say(f"{done}/{total} {cell.name}: " + (f"failed, {error}" if error else
                    f"{future.result():.0f} s") + _left(waiting, took, jobs))  # fmt: skip
    if failed:
        raise LisaError(
            f"{len(failed)} of {total} runs failed, first {min(failed)}: {failed[min(failed)]} "
            f"(log: {work / min(failed)}.log). What was finished is kept; mend it and run again."
        )
    return sorted(waiting)


def _ready(waiting: Mapping[str, Cell], kept: Path, places: int) -> list[Cell]:
    found = (c for c in waiting.values() if all((kept / name).exists() for name in c.after))
    return [cell for cell, _ in zip(found, range(places), strict=False)]


def _left(waiting: Mapping[str, Cell], took: Mapping[str, Sequence[float]], jobs: int) -> str:
    """Time left, by what cells of the kind took; of kinds not seen yet, the mean of all."""
    every = [x for values in took.values() for x in values]
    if not waiting or not every:
        return ""
    mean = {kind: statistics.fmean(values) for kind, values in took.items()}
    seconds = sum(mean.get(c.kind, statistics.fmean(every)) for c in waiting.values()) / jobs
    return f"; {len(waiting)} to go, about {seconds / 60:.0f} min"


def _make(run_dir: str, words: tuple[str, ...], ablated: tuple[str, ...] | None) -> float:
    """Train and ablate in this process; what it prints goes to a file beside the directory."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import torch

    from lisa_train.command.ablate import main as ablate
    from lisa_train.command.cli import main as train

    torch.set_num_threads(1)
    begun = time.monotonic()
    with Path(f"{run_dir}.log").open("w", encoding="utf-8") as log:
        out, err = os.dup(1), os.dup(2)
        try:
            sys.stdout.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = train([*words, "--output_dir", run_dir])
            if not code and ablated is not None:
                code = ablate([run_dir, *ablated])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
    if code:
        last = Path(f"{run_dir}.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(" ".join(last) or f"exit code {code}")
    return time.monotonic() - begun


def keep(run_dir: Path, kept: Path, *, study: str) -> None:
    """Copy a log, whole or not at all; take the machine's folders and name out.

    Files that the run was given (probabilities, profiles, multipliers) are copied by their names:
    a run directory holds them already.
    """
    partial = kept.with_name(f".{kept.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(run_dir / name, partial)
    if (run_dir / ABLATION).exists():
        _keep_ablation(run_dir / ABLATION, partial / ABLATION)
    for name in TABLES:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, partial / name)
    manifest = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    config, manifest = (
        _without_folders(content, run_dir, partial) for content in (config, manifest)
    )
    manifest["command"] = f"python reports/{study}/study.py"
    manifest["hardware"].update(host="example", platform="Linux")
    manifest.pop("pid", None)
    (partial / "run.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    partial.replace(kept)


def _keep_ablation(source: Path, target: Path) -> None:
    """Copy an ablation; its metadata name the base and the data, which may be folders."""
    import pyarrow.parquet as pq

    from lisa_train.measure.disk.encoding import write_parquet

    table = pq.read_table(source)
    about = json.loads(table.schema.metadata[b"ablation"])
    about["base"] = Path(about["base"]).name
    for data in about["data"].values():
        data["name"] = Path(data["name"]).name
    write_parquet(target, table, {"ablation": json.dumps(about, ensure_ascii=False)})


def _without_folders(content: object, run_dir: Path, partial: Path) -> object:
    """Replace absolute paths, at any depth, by their last part; copy files that the run holds."""
    if isinstance(content, dict):
        return {key: _without_folders(value, run_dir, partial) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_folders(value, run_dir, partial) for value in content]
    if isinstance(content, str) and content.startswith("/"):
        name = Path(content).name
        if (run_dir / name).is_file() and not (partial / name).exists():
            shutil.copy(run_dir / name, partial)
        return name
    return content
