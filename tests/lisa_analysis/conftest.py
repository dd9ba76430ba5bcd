"""Synthetic run directories with known truth: AR(1) noise, LISA schedules, LoRA, planted faults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lisa_analysis.contract.schema import (
    EVENTS,
    MANIFEST,
    METRICS_DIR,
    METRICS_TABLE,
    PARAMETERS,
    PARAMETERS_TABLE,
    SCALARS,
    SCHEMA_VERSION,
    shard_name,
)
from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.run import Run
from lisa_analysis.rundir.shards import arrow_schema

KINDS = ("attn.q", "mlp.down")
MODULES = {"attn.q": "self_attn.q_proj", "mlp.down": "mlp.down_proj"}
RATE = 1e-3
NUMEL = 10_000


def ar1_noise(rng: np.random.Generator, n: int, columns: int, rho: float) -> np.ndarray:
    """Stationary AR(1) series of unit variance, shape (n, columns)."""
    noise = rng.standard_normal((n, columns))
    noise[1:] *= np.sqrt(1 - rho**2)
    for t in range(1, n):
        noise[t] += rho * noise[t - 1]
    return noise


def random_draws(n_layers: int, k: int, count: int, rng: np.random.Generator) -> list[list[int]]:
    return [sorted(rng.choice(n_layers, k, replace=False).tolist()) for _ in range(count)]


class RunMaker:
    """Writes run directories; every call gives a loaded `Run`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def __call__(
        self,
        *,
        profile: np.ndarray | list[float] | int = 8,
        steps: int = 100,
        every: int = 1,
        method: str = "full",
        noise: float = 0.2,
        rho: float = 0.0,
        common: float = 0.1,
        trend: float = 0.0,
        k: int = 2,
        interval: int = 10,
        draws: list[list[int]] | None = None,
        directed: float = 1.0,
        rank: int = 8,
        seed: int = 0,
        edit: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
        edit_scalars: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
        edit_events: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
        manifest: dict[str, Any] | None = None,
        shards: int = 2,
        census: bool = True,
        run_id: str | None = None,
    ) -> Run:
        """Write a run whose gradients and updates follow `profile` (a count: a flat one).

        A gradient of layer i at step t is profile[i] · exp(noise · AR1 + common · white +
        trend · t/steps); the update is RATE times it, ΔW grows as (own steps)^directed.
        """
        truth = np.ones(profile) if isinstance(profile, int) else np.asarray(profile, float)
        n_layers = len(truth)
        rng = np.random.default_rng(seed)
        self.count += 1
        path = self.root / f"run{self.count}"
        (path / METRICS_DIR).mkdir(parents=True)
        parameters = _parameters(n_layers, method, rank)
        _write(path / PARAMETERS, parameters, PARAMETERS_TABLE)
        if method == "lisa" and draws is None:
            draws = random_draws(n_layers, k, -(-steps // interval), rng)
        time = np.arange(1, steps + 1)
        active = np.ones((steps, n_layers), dtype=bool)
        if draws is not None:
            active[:] = False
            for row in range(steps):
                active[row, draws[row // interval]] = True
        log_gradient = (
            np.log(truth)
            + noise * ar1_noise(rng, steps, n_layers, rho)
            + common * rng.standard_normal((steps, 1))
            + trend * time[:, None] / steps
        )
        recorded = time[(time % every == 0) | (time == 1)]
        frame = _rows(parameters, recorded, np.exp(log_gradient), active, method, interval,
                      directed)  # fmt: skip
        if edit is not None:
            frame = edit(frame)
        cuts = np.array_split(recorded, min(shards, len(recorded)))
        for number, chunk in enumerate(cuts):
            rows = frame[frame["step"].isin(chunk)]
            if number == 0 and census:
                rows = pd.concat([_census(parameters, rng), rows])
            first = 0 if number == 0 and census else int(chunk[0])
            _write(path / METRICS_DIR / shard_name(0, first), rows, METRICS_TABLE)
        self._streams(path, steps, frame, draws, interval, n_layers, k, edit_scalars, edit_events)
        content = {
            "schema_version": SCHEMA_VERSION, "run_id": run_id or path.name, "status": "finished",
            "segment": 0, "created": "2026-11-23T10:00:00+00:00", "method": method,
            "updated": "2026-11-23T10:10:00+00:00", "versions": {}, "hardware": {},
            "model": {"name": "tiny", "dtype": "float32"},
            "seeds": {"seed": seed, "data_seed": seed}, "command": "",
            "recording": {"every": every},
            "layers": [{"index": i, "name": f"model.layers.{i}", "stack": "model.layers"}
                       for i in range(n_layers)],
            "result": {"steps": steps},
        }  # fmt: skip
        if method == "lisa":
            content["lisa"] = {"activated_layers": k, "interval_steps": interval,
                               "always_active": ["embed", "head", "norm"],
                               "optimizer_state": "reset", "sampling": "uniform"}  # fmt: skip
        if method == "lora":
            content["lora"] = {"r": rank, "lora_alpha": 2 * rank}
        content |= manifest or {}
        (path / MANIFEST).write_text(json.dumps(content))
        return load(path)

    @staticmethod
    def _streams(path, steps, frame, draws, interval, n_layers, k, edit_scalars, edit_events):
        norms = frame.assign(square=frame["grad_norm"].astype(float) ** 2)
        total = np.sqrt(norms.groupby("step")["square"].sum())
        time = np.arange(1, steps + 1)
        scalars = pd.DataFrame(
            {
                "step": time, "loss": 2 + np.exp(-3 * time / steps), "learning_rate": RATE,
                "grad_norm": total.reindex(time).to_numpy(), "clip_coef": 1.0,
                "tokens": 512 * time, "step_seconds": 0.25, "recorder_seconds": 0.001,
                "peak_memory_bytes": 10**9, "skipped": False,
            }
        )  # fmt: skip
        if edit_scalars is not None:
            scalars = edit_scalars(scalars)
        _lines(path / SCALARS, scalars.to_dict("records"))
        visits = np.zeros(n_layers, dtype=int)
        events: list[dict[str, Any]] = []
        for index, layers in enumerate(draws or []):
            visits[layers] += 1
            events.append({"event": "lisa_draw", "step": index * interval, "time": 0.0,
                           "layers": list(layers), "visits": visits.tolist(),
                           "inclusion_probabilities": [k / n_layers] * n_layers})  # fmt: skip
        events += [
            {"event": "evaluate", "step": step, "time": 1.0 + step / 4,
             "metrics": {"eval_loss": 2.0 + float(np.exp(-3 * step / steps))}}
            for step in (0, steps)
        ]  # fmt: skip
        if edit_events is not None:
            events = edit_events(events)
        _lines(path / EVENTS, events)


def _parameters(n_layers: int, method: str, rank: int) -> pd.DataFrame:
    rows: list[tuple[str, int | None, str, str, int, str]] = [
        ("model.embed_tokens.weight", None, "embed", "base", 4 * NUMEL, "400x100")
    ]
    for layer in range(n_layers):
        for kind in KINDS:
            module = f"model.layers.{layer}.{MODULES[kind]}"
            if method == "lora":
                rows += [
                    (f"{module}.base_layer.weight", layer, kind, "base", NUMEL, "100x100"),
                    (f"{module}.lora_A.default.weight", layer, kind, "lora_A", rank * 100,
                     f"{rank}x100"),
                    (f"{module}.lora_B.default.weight", layer, kind, "lora_B", rank * 100,
                     f"100x{rank}"),
                ]  # fmt: skip
            else:
                rows.append((f"{module}.weight", layer, kind, "base", NUMEL, "100x100"))
    rows.append(("model.norm.weight", None, "norm", "base", 100, "100"))
    if method == "lora":
        rows[1:1] = [
            ("model.embed_tokens.lora_embedding_A.default", None, "embed", "lora_A", rank * 400,
             f"{rank}x400"),
            ("model.embed_tokens.lora_embedding_B.default", None, "embed", "lora_B", rank * 100,
             f"100x{rank}"),
        ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["name", "layer", "kind", "role", "numel", "shape"])
    frame.insert(0, "param_id", np.arange(len(frame), dtype=np.int32))
    frame["layer"] = frame["layer"].astype("Int16")
    frame["dtype"] = "float32"
    frame["tied_to"] = pd.array([pd.NA] * len(frame), dtype="Int32")
    return frame


def _initial_norms(parameters: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Norms at step 0: PEFT's defaults for adapters, 0.02·√N for weights."""
    norms = 0.02 * np.sqrt(parameters["numel"].to_numpy(dtype=float))
    for row, (name, role, shape) in enumerate(
        zip(parameters["name"], parameters["role"], parameters["shape"], strict=True)
    ):
        sides = [int(side) for side in shape.split("x")]
        if "lora_embedding" in name:
            norms[row] = np.sqrt(np.prod(sides)) if role == "lora_B" else 0.0
        elif role == "lora_A":
            bound = 1 / np.sqrt(sides[1])
            norms[row] = np.linalg.norm(rng.uniform(-bound, bound, sides))
        elif role == "lora_B":
            norms[row] = 0.0
    return norms


def _census(parameters: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    norms = _initial_norms(parameters, np.random.default_rng(7))
    return pd.DataFrame({"step": 0, "param_id": parameters["param_id"], "weight_norm": norms})


def _rows(parameters, recorded, gradient, active, method, interval, directed):
    """One row per recorded step and trained tensor; tensors of a layer share its norm equally."""
    layer = parameters["layer"].astype("Float64").fillna(-1).to_numpy(dtype=int)
    adapters = (parameters["role"] != "base").to_numpy()
    trainable = adapters if method == "lora" else np.ones(len(parameters), dtype=bool)
    start = _initial_norms(parameters, np.random.default_rng(7))
    own_steps = np.cumsum(active, axis=0)
    parts = []
    for param in np.flatnonzero(trainable):
        inside = layer[param] >= 0
        when = recorded[active[recorded - 1, layer[param]]] if inside else recorded
        row = when - 1
        share = 1 / np.sqrt((trainable & (layer == layer[param])).sum()) if inside else 1.0
        norm = gradient[row, layer[param]] * share if inside else np.full(len(row), 0.5)
        moved = RATE * (own_steps[row, layer[param]] if inside else when) ** directed
        change = moved * share * (gradient[row, layer[param]] / norm * norm if inside else 1.0)
        change = moved * share * (np.median(norm) / share if len(norm) and inside else 1.0)
        if method == "lora":
            change = change if parameters["role"][param] == "lora_B" else np.full(len(row), np.nan)
        parts.append(
            pd.DataFrame(
                {
                    "step": when, "param_id": param,
                    "weight_norm": np.hypot(start[param], 1e-3 * moved),
                    "grad_norm": norm, "grad_norm_l1": norm * np.sqrt(NUMEL) * 0.8,
                    "update_norm": RATE * norm, "descent": RATE * norm**2,
                    "delta_norm": change,
                    "opt_steps": (when - 1) % interval + 1 if method == "lisa" and inside else when,
                }
            )
        )  # fmt: skip
    return pd.concat(parts).sort_values(["step", "param_id"], kind="stable", ignore_index=True)


def _write(path: Path, frame: pd.DataFrame, table: Any) -> None:
    schema = pa.schema([field for field in arrow_schema(table) if field.name in frame])
    if "delta_norm" in frame and "opt_steps" in frame:
        frame = frame.assign(opt_steps=frame["opt_steps"].astype("Int32"))
    columns = []
    for field in schema:
        values = frame[field.name]
        if field.name in ("step", "param_id", "opt_steps") or table is PARAMETERS_TABLE:
            columns.append(pa.Array.from_pandas(values, type=field.type))
            continue
        # Null: a census row, or what LoRA does not have; a planted NaN stays NaN.
        numbers = values.to_numpy(dtype=np.float32)
        null = np.isnan(numbers) & (
            (frame["step"] == 0) | (field.name in ("delta_norm", "merged_norm"))
        )
        columns.append(pa.array(numbers, type=field.type, mask=null.to_numpy()))
    data = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(data.replace_schema_metadata({"schema_version": SCHEMA_VERSION}), path)


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    def plain(value: Any) -> Any:
        if hasattr(value, "item"):
            value = value.item()
        return None if isinstance(value, float) and np.isnan(value) else value

    path.write_text(
        "".join(
            json.dumps({key: plain(value) for key, value in record.items()}) + "\n"
            for record in records
        )
    )


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """Writer of synthetic run directories below a temporary folder."""
    return RunMaker(tmp_path)
