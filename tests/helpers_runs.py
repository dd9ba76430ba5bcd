"""Synthetic run directories with known contents, for the plots, the report and the browser."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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
from lisa_analysis.rundir.shards import arrow_schema

KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "norm")
SPELLING = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj", "norm": "input_layernorm"}  # fmt: skip


def write_run(
    path: Path,
    *,
    n_layers: int = 12,
    steps: int = 200,
    every: int = 10,
    method: str = "lisa",
    status: str = "finished",
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    interval: int = 10,
    k: int = 2,
    run_id: str | None = None,
    model_name: str = "example/tiny-llama",
    layer_prefix: str = "model.layers",
    nan_at: int | None = None,
    extra: dict | None = None,
) -> Path:
    """Write a run whose layers follow a U-shaped profile with multiplicative noise."""
    rng = np.random.default_rng(seed)
    (path / METRICS_DIR).mkdir(parents=True)
    layer_names = [f"{layer_prefix}.{i}" for i in range(n_layers)]
    _write_manifest(path, layer_names, method, status, seed, run_id or path.name, model_name, steps,
                    k, interval, every, extra or {})  # fmt: skip
    table = _parameters(layer_names, kinds, method)
    _write(path / PARAMETERS, table, PARAMETERS_TABLE)
    draws = [sorted(rng.choice(n_layers, k, replace=False).tolist())
             for _ in range(0, steps, interval)] if method == "lisa" else []  # fmt: skip
    _write_events(path, draws, interval, n_layers, k, steps)
    recorded = [s for s in range(1, steps + 1) if s == 1 or s % every == 0]
    _write(path / METRICS_DIR / shard_name(0, 0), _census(table), METRICS_TABLE)
    norms: dict[int, float] = {}
    for start in range(0, len(recorded), 2000):
        chunk = np.array(recorded[start : start + 2000])
        rows = _rows(chunk, table, draws, interval, rng, n_layers, nan_at)
        _write(path / METRICS_DIR / shard_name(0, int(chunk[0])), rows, METRICS_TABLE)
        squares = (rows["grad_norm"] ** 2).groupby(rows["step"]).sum(min_count=1)
        norms |= np.sqrt(squares).to_dict()
    _write_scalars(path, rng, steps, norms)
    return path


def _write_manifest(path, layer_names, method, status, seed, run_id, model_name, steps, k,
                    interval, every, extra):  # fmt: skip
    manifest = {
        "schema_version": SCHEMA_VERSION, "run_id": run_id, "status": status, "segment": 0,
        "created": "2026-11-23T10:00:00+00:00", "updated": "2026-11-23T10:20:00+00:00",
        "method": method, "command": "lisa-train --config lisa --hub_token hf_" + "a" * 24,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "lisa-toolkit": "0.1.0"},
        "hardware": {"device": "cpu", "name": "x86_64", "cpus": 2},
        "model": {"name": model_name, "architecture": "LlamaForCausalLM", "parameters": 134_515_008,
                  "dtype": "float32"},
        "seeds": {"seed": seed, "data_seed": seed, "lisa_seed": seed},
        "layers": [{"index": i, "name": name, "stack": name.rsplit(".", 1)[0]}
                   for i, name in enumerate(layer_names)],
        "recording": {"every": every},
        "result": {"steps": steps, "tokens": steps * 512, "seconds": steps * 0.25},
        "dataset": {"name": "example/chat", "train": 1000, "held_out": 50},
        **extra,
    }  # fmt: skip
    if method == "lisa":
        manifest["lisa"] = {"activated_layers": k, "interval_steps": interval}
    if method == "lora":
        manifest["lora"] = {"r": 8, "lora_alpha": 16}
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (path / "config.yaml").write_text(
        f"method: {method}\nmodel_name_or_path: {model_name}\nhub_token: hf_{'b' * 24}\n"
        "learning_rate: 1.0e-05\n"
    )


def _parameters(layer_names, kinds, method):
    rows = [("model.embed_tokens.weight", None, "embed", "base", 49152 * 576)]
    for layer, name in enumerate(layer_names):
        for kind in kinds:
            module = f"{name}.{SPELLING[kind]}"
            if method == "lora" and kind != "norm":
                rows.append((f"{module}.base_layer.weight", layer, kind, "base", 576 * 576))
                rows.append((f"{module}.lora_A.default.weight", layer, kind, "lora_A", 8 * 576))
                rows.append((f"{module}.lora_B.default.weight", layer, kind, "lora_B", 8 * 576))
            else:
                rows.append((f"{module}.weight", layer, kind, "base", 576 * 576))
    rows.append(("model.norm.weight", None, "norm", "base", 576))
    frame = pd.DataFrame(rows, columns=["name", "layer", "kind", "role", "numel"])
    frame.insert(0, "param_id", np.arange(len(frame)))
    frame["layer"] = frame["layer"].astype("Int16")
    frame["shape"], frame["dtype"] = "24x24", "float32"
    frame["tied_to"] = pd.array([pd.NA] * len(frame), dtype="Int32")
    return frame


def _census(table):
    size = np.sqrt(table["numel"].to_numpy()) * 0.02
    size[(table["role"] == "lora_B").to_numpy()] = 0.0
    return pd.DataFrame({"step": 0, "param_id": table["param_id"], "weight_norm": size})


def _rows(steps, table, draws, interval, rng, n_layers, nan_at):
    layer = table["layer"].astype("Float64").fillna(-1).to_numpy(dtype=int)
    trainable = (table["role"] != "base").to_numpy() if (table["role"] != "base").any() else True
    depth = np.linspace(-1, 1, n_layers)
    shape = np.append(0.3 + depth**2, 0.5)  # the last entry is for tensors outside the stack
    active = np.ones((len(steps), len(table)), dtype=bool) & trainable
    if draws:
        chosen = np.zeros((len(steps), n_layers + 1), dtype=bool)
        chosen[:, -1] = True
        for row, step in enumerate(steps):
            chosen[row, draws[min((step - 1) // interval, len(draws) - 1)]] = True
        active &= chosen[:, layer]
    at, which = np.nonzero(active)
    noise = np.exp(0.25 * rng.standard_normal(len(at)) + 0.1 * rng.standard_normal(len(steps))[at])
    grad = 0.1 * shape[layer[which]] * noise
    if nan_at is not None:
        grad[(steps[at] == nan_at) & (layer[which] == 1)] = np.nan
    weight = np.sqrt(table["numel"].to_numpy()[which]) * 0.02 + 1e-6 * steps[at]
    update = 1e-3 * shape[layer[which]] * noise
    return pd.DataFrame(
        {
            "step": steps[at], "param_id": which, "weight_norm": weight, "grad_norm": grad,
            "update_norm": update, "descent": grad * update * 0.4,
            "delta_norm": 1e-3 * np.sqrt(steps[at]) * shape[layer[which]],
            "opt_steps": (steps[at] - 1) % interval + 1,
        }
    )  # fmt: skip


def _write_events(path, draws, interval, n_layers, k, steps):
    lines, visits = [], np.zeros(n_layers, dtype=int)
    for index, layers in enumerate(draws):
        visits[layers] += 1
        lines.append({"event": "lisa_draw", "step": index * interval, "time": 1.0 + index,
                      "layers": layers, "inclusion_probabilities": [k / n_layers] * n_layers,
                      "visits": visits.tolist()})  # fmt: skip
    lines += [{"event": "evaluate", "step": step, "time": 2.0 + step,
               "metrics": {"eval_loss": 2.0 + np.exp(-step / steps)}}
              for step in range(0, steps + 1, max(steps // 4, 1))]  # fmt: skip
    (path / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_scalars(path, rng, steps, norms):
    loss = 2 + np.exp(-np.arange(steps) / steps * 3) + 0.1 * rng.standard_normal(steps)
    # Recorded steps log the norm of their rows, so that the two agree as in a real run.
    typical = np.nanmedian(list(norms.values()))
    norm = typical * np.exp(0.3 * rng.standard_normal(steps))
    for step, value in norms.items():
        norm[step - 1] = value
    with (path / SCALARS).open("w") as file:
        for i in range(steps):
            line = {"step": i + 1, "epoch": i / steps, "loss": round(loss[i], 5),
                    "learning_rate": 1e-4 * (1 - i / steps),
                    "grad_norm": norm[i] if np.isfinite(norm[i]) else "NaN",
                    "clip_coef": min(1.0, 1.3 * typical / norm[i]), "tokens": 512 * (i + 1),
                    "step_seconds": 0.25, "recorder_seconds": 0.004 * (i % 10 == 0),
                    "peak_memory_bytes": 2_500_000_000}  # fmt: skip
            file.write(json.dumps(line) + "\n")


def _write(path, frame, table):
    schema = pa.schema([f for f in arrow_schema(table) if f.name in frame])
    # NaN is a measured value in this contract: only pandas' own NA becomes null.
    arrays = [
        pa.array(frame[field.name], field.type, from_pandas=table is not METRICS_TABLE)
        for field in schema
    ]
    data = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(data.replace_schema_metadata({"schema_version": SCHEMA_VERSION}), path)
