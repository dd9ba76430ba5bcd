"""Peak memory and speed of every method and option, beside the estimate.

python reports/memory/measure.py --device cuda                 the four shapes, 1 x 1024 tokens
python reports/memory/measure.py --device cpu                  tiny shapes: bytes counted, no times
python reports/memory/measure.py --device cpu --shapes Llama-3.1-8B --length 1024 --timed 1 --append
                                                               a whole model, if it fits, with times
python reports/memory/measure.py --shapes Llama-3.1-8B --cases "LISA E+H+2L" "LoRA r=16"

Models have random weights, made on the device from configurations that stand in shapes.py; no hub
is asked. Every case runs in a process of its own. Writes results.json, results.md and figure.png
into --out; --append adds to those that lie there, from the same machine and versions.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cases import cases

HERE = Path(__file__).resolve().parent
ON = {
    "cuda": (("TinyLlama-1.1B", "LLaMA-2-7B", "Llama-3.1-8B", "Qwen3-8B"), 1024),
    "cpu": (("tiny-llama", "tiny-qwen3", "tiny-gpt2"), 64),
}
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "numpy")
# Give tensors back to the kernel as they are freed, so that what is resident is what is alive.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
STEPS_TIMED = {"cuda": 10, "cpu": 0}
TIME_LIMIT = 1800


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(ON), default="cuda")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--cases", nargs="+", help="names of cases; all by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int)
    parser.add_argument(
        "--timed", type=int, help="steps whose time is taken; 10 on a GPU, none on a CPU"
    )
    parser.add_argument("--append", action="store_true", help="add to the results in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    arguments = parser.parse_args(argv)
    shapes, length = ON[arguments.device]
    shapes, length = arguments.shapes or shapes, arguments.length or length
    timed = arguments.timed if arguments.timed is not None else STEPS_TIMED[arguments.device]
    names = arguments.cases or [case.name for case in cases(1, 1)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": arguments.device,
        "batch_size": arguments.batch_size,
        "sequence_length": length,
        "hardware": hardware(arguments.device),
        "versions": versions(),
        "rows": [],
    }
    if arguments.append:
        results["rows"] = earlier_rows(arguments.out / "results.json", results)
    for shape in shapes:
        for name in names:
            row = run(shape, name, arguments.device, arguments.batch_size, length, timed)
            add(results["rows"], row)
            print(f"{shape}, {name}: {row['status']}", file=sys.stderr, flush=True)
            write(results, arguments.out)
    return 0


def earlier_rows(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call with the same machine, versions and batch."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name, value in results.items():
        if name != "rows" and earlier.get(name) != value:
            raise SystemExit(
                f"measure.py: {path} was measured with another {name} ({earlier.get(name)}, here "
                f"{value}); choose another --out."
            )
    rows: list[dict[str, Any]] = earlier["rows"]
    return rows


def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put a row in the place of the same case's, or at the end."""
    for i, known in enumerate(rows):
        if (known["shape"], known["case"]) == (row["shape"], row["case"]):
            rows[i] = row
            return
    rows.append(row)


def run(
    shape: str, case: str, device: str, batch_size: int, length: int, timed: int
) -> dict[str, Any]:
    """Measure the bytes of one case, then its times, each in a process of its own.

    On a CPU memory is given back to the kernel at once while bytes are measured, which takes time.
    """
    command = [
        sys.executable, str(HERE / "one.py"), shape, case, "--device", device,
        "--batch-size", str(batch_size), "--length", str(length),
    ]  # fmt: skip
    known = {"shape": shape, "case": case}
    row = known | result_of(command, ALLOCATOR)
    if row["status"] == "killed":
        # By the kernel, as it does where memory ends: what was to be expected is still of interest.
        return known | result_of([*command, "--estimate-only"], {}) | {"status": "out of memory"}
    if timed and row["status"] == "ok":
        again = result_of([*command, "--timed", str(timed)], {})
        if again["status"] != "ok":
            return row | {"message": f"no times: {again['status']}"}
        row["measured"] |= again["measured"]
    return row


def result_of(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What one.py prints; what goes wrong in it is reported as such."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT,
            env={**os.environ, **environment},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"status": "took too long", "message": f"over {TIME_LIMIT} s"}
    if done.returncode == -signal.SIGKILL:
        return {"status": "killed"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"status": "failed", "message": last[:300]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def hardware(device: str) -> dict[str, Any]:
    """Processor or GPU, without the name of the host."""
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("measure.py: no CUDA device is present; use --device cpu.")
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name, "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "processors": len(models) or None,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(results: dict[str, Any], folder: Path) -> None:
    """Write what there is so far: a study that breaks off keeps its rows."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    figure(results, folder / "figure.png")


def markdown(results: dict[str, Any]) -> str:
    """One table per shape: bytes and times where times were taken, else every count of bytes."""
    described = ", ".join(
        f"{k} {v}" for k, v in (results["hardware"] | results["versions"]).items()
    )
    timed = any((row.get("measured") or {}).get("timed_steps") for row in results["rows"])
    unit, name = _unit(results)
    lines = [
        f"Batch {results['batch_size']} × {results['sequence_length']} tokens, {name} = {unit:.0e} "
        f"bytes. {described}.",
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["shape"] == shape]
        body = _timed_table(rows, unit, results["device"]) if timed else _cpu_table(rows, unit)
        lines += ["", f"## {shape}", "", *body]
    return "\n".join(lines) + "\n"


def _unit(results: dict[str, Any]) -> tuple[float, str]:
    large = any((row.get("estimate") or {}).get("total", 0) >= 1e9 for row in results["rows"])
    return (1e9, "GB") if large else (1e6, "MB")


def _timed_table(rows: list[dict[str, Any]], unit: float, device: str) -> list[str]:
    """Return peaks beside the estimate, and times beside what skipping allows.

    "Of full" compares the forward and backward passes, without the optimizer's part, with those of
    full fine-tuning; "allowed" takes from the latter the time that the skipped weight gradients
    need by themselves; "arithmetic" is the ratio of floating-point operations.
    """
    other = "reserved" if device == "cuda" else "resident"
    lines = [
        f"| case | estimate | allocated | deviation | {other} | step, s | tokens/s | of full | "
        "allowed | arithmetic |",
        "|" + "---|" * 10,
    ]
    full = next((row for row in rows if row["case"] == "full" and _passes(row)), None)
    for row in rows:
        found, guess = row.get("measured"), row.get("estimate")
        estimate = f"{guess['total'] / unit:.2f}" if guess else "–"
        if row["status"] != "ok" or not found or not guess:
            lines.append(f"| {row['case']} | {estimate} | {row['status']} |" + " |" * 7)
            continue
        allocated, second = found["peak_allocated"], found.get(f"peak_{other}")
        cells = [
            row["case"], estimate, f"{allocated / unit:.2f}",
            f"{guess['total'] / allocated - 1:+.1%}", f"{second / unit:.2f}" if second else "–",
            *_times(row, full),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(row: dict[str, Any], full: dict[str, Any] | None) -> list[str]:
    """Cells of a row of the table of times; a dash where something was not measured."""
    if not _passes(row):
        return ["–"] * 5
    found = row["measured"]
    cells = [f"{found['step_seconds']:.2f}", f"{found['tokens_per_second']:.0f}"]
    if full is None:
        return cells + ["–"] * 3
    # A checkpointed step computes more than it skips, of another kind.
    again = "checkpointing" in row["case"] or "all that saves" in row["case"]
    skipped = None if again else found.get("skipped_seconds")
    allowed = None if skipped is None else 1 - skipped / _passes(full)
    return [
        *cells, f"{_passes(row) / _passes(full):.2f}",
        "–" if allowed is None else f"{allowed:.2f}", f"{row['flops'] / full['flops']:.2f}",
    ]  # fmt: skip


def _passes(row: dict[str, Any]) -> float:
    """Seconds of forward and backward pass; 0 where no time was taken."""
    found = row.get("measured") or {}
    return found.get("step_seconds", 0.0) - found.get("optimizer_seconds", 0.0)


def _cpu_table(rows: list[dict[str, Any]], unit: float) -> list[str]:
    """Return counted / estimated bytes."""
    lines = [
        "counted / estimated",
        "",
        "| case | weights | gradients | state | saved activations | peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found, guess = row.get("measured"), row.get("estimate")
        if row["status"] != "ok" or not found or not guess:
            lines.append(f"| {row['case']} | {row['status']} | | | | |")
            continue
        state = guess["optimizer"] + guess["paged_or_host"]
        pairs = [
            (found["weights"], guess["weights"]), (found["gradients"], guess["gradients"]),
            (found["optimizer"], state), (found["saved"], guess["saved"]),
            (found["peak_allocated"], guess["total"]),
        ]  # fmt: skip
        cells = " | ".join(f"{a / unit:.3f} / {b / unit:.3f}" for a, b in pairs)
        lines.append(f"| {row['case']} | {cells} |")
    return lines


def figure(results: dict[str, Any], path: Path) -> None:
    """Bars of the measured peak, and a mark where the estimate lies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lisa_analysis.views.plots.style import SERIES, finish

    rows = [row for row in results["rows"] if row.get("estimate")]
    if not rows:
        return
    unit, name = _unit(results)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    most = max(sum(row["shape"] == shape for row in rows) for shape in shapes)
    columns = min(len(shapes), 2 if len(shapes) != 3 else 3)
    lines = -(-len(shapes) // columns)
    size = (5.2 * columns, lines * (1.1 + 0.3 * most) + 0.4)
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    for i, shape in enumerate(shapes):
        ax = drawing.add_subplot(lines, columns, i + 1)
        of_shape = [row for row in rows if row["shape"] == shape]
        places = range(len(of_shape))
        peaks = [(row.get("measured") or {}).get("peak_allocated", 0) / unit for row in of_shape]
        ax.barh(places, peaks, color=SERIES[0], height=0.6, label="measured peak")
        totals = [row["estimate"]["total"] / unit for row in of_shape]
        ax.plot(totals, places, "|", color=SERIES[3], markersize=14, mew=2, label="estimate")
        ax.set_yticks(list(places), [row["case"] for row in of_shape], fontsize="small")
        ax.set_ylim(most - 0.5, -0.5)  # bars of one width in all panels
        ax.set_xlabel(f"peak memory, {name}")
        ax.set_title(shape, loc="left", fontsize="medium")
        finish(ax, grid="x")
    handles, labels = ax.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    drawing.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
