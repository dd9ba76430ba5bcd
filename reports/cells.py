"""Many runs of one plan: each once, several at a time, and on from where it stopped.

A study is a list of cells. A cell is one `lisa-train`, and perhaps `lisa-ablate`, whose log is kept
beside the study's page; what is kept is not made again, on any machine. Processes are kept warm:
importing torch takes longer than some of the runs.
"""

import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from lisa_analysis.contract.errors import LisaError

KEPT = ("config.yaml", "parameters.parquet", "scalars.jsonl", "events.jsonl")
ABLATION = "ablation.parquet"
TABLES = ("metrics", "probes")
ROUND = 30  # cells of a process, then a fresh one: what libraries hold on to does not grow
# Of processes that train. Memory that a step gave back is used again, in huge pages, instead of
# being asked of the system anew: with two runs on two cores, a step of SmolLM2 under autocast takes
# a third less. Losses are the same to the bit.
ALLOCATION = {
    "THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34),
}  # fmt: skip


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
    threads: int = 1,
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
        Runs at a time.
    threads
        Of each run.
    seconds
        Begin no further cell after so long; None goes on to the end.
    say
        Gets a line for every cell that ends.

    Raises
    ------
    LisaError
        When cells fail; the others are run first.
    """
    if len({cell.name for cell in cells}) < len(cells):
        raise LisaError("two cells of the plan have one name.")
    rounds = _Rounds(cells, kept, work, jobs, threads, seconds, say)
    before = dict(os.environ)
    os.environ.update({**ALLOCATION, **before})  # read when a process starts
    try:
        while rounds.go_on():
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                rounds.run(pool)
    finally:
        for name in ALLOCATION.keys() - before.keys():
            del os.environ[name]
    if rounds.failed:
        first = min(rounds.failed)
        raise LisaError(
            f"{len(rounds.failed)} of {rounds.total} runs failed, first {first}: "
            f"{rounds.failed[first]} (log: {work / first}.log). What was finished is kept; mend it "
            "and run again."
        )
    return sorted(rounds.waiting)


class _Rounds:
    """What waits, runs and is done; processes are fresh for every round."""

    def __init__(
        self,
        cells: Sequence[Cell],
        kept: Path,
        work: Path,
        jobs: int,
        threads: int,
        seconds: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.waiting = {c.name: c for c in cells if not (kept / c.name).exists()}
        self.total = len(self.waiting)
        self.failed: dict[str, str] = {}
        self.took: dict[str, list[float]] = {}
        self.kept, self.work, self.say = kept, work, say
        self.jobs, self.threads = jobs, threads
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def go_on(self) -> bool:
        """Whether there is a cell to begin, and time for it."""
        return time.monotonic() < self.end and bool(self._ready(1))

    def run(self, pool: ProcessPoolExecutor) -> None:
        """Run a round."""
        running: dict[Future[float], Cell] = {}
        begun = 0
        while True:
            places = min(self.jobs - len(running), self.jobs * ROUND - begun)
            for cell in self._ready(places) if time.monotonic() < self.end else ():
                running[self._begin(cell, pool)] = cell
                begun += 1
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                self._end(running.pop(future), future, len(running))

    def _ready(self, places: int) -> list[Cell]:
        found = (
            cell
            for cell in self.waiting.values()
            if all((self.kept / name).exists() for name in cell.after)
        )
        return list(islice(found, places))

    def _begin(self, cell: Cell, pool: ProcessPoolExecutor) -> Future[float]:
        del self.waiting[cell.name]
        run_dir = self.work / cell.name
        shutil.rmtree(run_dir, ignore_errors=True)  # one that was cut short
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            words = tuple(cell.words())
        except LisaError as error:  # as of a training that fails: the others are run
            failed: Future[float] = Future()
            failed.set_exception(error)
            return failed
        return pool.submit(_make, str(run_dir), words, cell.ablated, self.threads)

    def _end(self, cell: Cell, future: Future[float], running: int) -> None:
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise LisaError(
                f"the process of {cell.name} was ended from outside, for want of memory perhaps: "
                "what was finished is kept; run again, with fewer --jobs."
            )
        done = f"{self.total - len(self.waiting) - running}/{self.total} {cell.name}"
        if error is not None:
            self.failed[cell.name] = str(error)
            self.say(f"{done}: failed, {error}")
            return
        self.took.setdefault(cell.kind, []).append(future.result())
        keep(self.work / cell.name, self.kept / cell.name, study=self.kept.parent.name)
        shutil.rmtree(self.work / cell.name)
        self.say(f"{done}: {future.result():.0f} s{self._left()}")

    def _left(self) -> str:
        """Time left, by what cells of the kind took; of kinds not seen yet, the mean of all."""
        if not self.waiting:
            return ""
        mean = {kind: statistics.fmean(values) for kind, values in self.took.items()}
        other = statistics.fmean(x for values in self.took.values() for x in values)
        seconds = sum(mean.get(cell.kind, other) for cell in self.waiting.values()) / self.jobs
        return f"; {len(self.waiting)} to go, about {seconds / 60:.0f} min"


def _make(
    run_dir: str, words: tuple[str, ...], ablated: tuple[str, ...] | None, threads: int
) -> float:
    """Train and ablate in this process; what it prints goes to a file beside the directory."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads))
    import torch

    from lisa_train.command.ablate import main as ablate
    from lisa_train.command.cli import main as train

    torch.set_num_threads(threads)
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
