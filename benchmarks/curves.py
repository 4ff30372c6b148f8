"""Lines through measured points, as the fields of `fit` records: what a report draws is in its records, too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks import points, predict
from benchmarks.cases import from_dict

Record = Mapping[str, Any]
_LEAST_SIZES = 3  # a line through two points says nothing of the model
_DRAWN = 33  # points of a line


def of_all_reduces(comm_points: Iterable[Record]) -> list[dict[str, Any]]:
    """Return the fit of seconds = latency + bytes / bandwidth for each sweep of sizes, by relative error."""
    found = []
    sweeps = _grouped(comm_points, lambda point: (point.get("what"), point["replicas"], point["hosts"]))
    for (what, replicas, hosts), sweep in sweeps.items():
        sizes = np.array([point["bytes"] for point in sweep], float)
        seconds = np.array([point["seconds"]["median"] for point in sweep])
        if len(set(sizes)) < _LEAST_SIZES:
            continue
        (latency, per_byte), _ = nnls(np.stack([1 / seconds, sizes / seconds], axis=1), np.ones_like(seconds))
        drawn = np.geomspace(sizes.min(), sizes.max(), _DRAWN)
        on_bus = 2 * (replicas - 1) / replicas * drawn / (latency + drawn * per_byte)
        errors = np.abs((latency + sizes * per_byte) / seconds - 1)
        found.append(
            {
                "model": "all-reduce: latency + bytes / bandwidth",
                "parameters": {"latency_s": latency, "bytes_per_s": 1 / per_byte if per_byte else None},
                "error": {"mean": errors.mean().item(), "max": errors.max().item()},
                "points": len(sweep),
                **{"what": what, "replicas": replicas, "hosts": hosts},
                "curve": np.stack([drawn, on_bus], axis=1).tolist(),
            }
        )
    return found


def of_sweeps(lines: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what the scaling model says of each sweep, of the env, result and comm_point lines of a run.

    What the model does not explain has no curve.
    """
    steps = [
        line
        for line in lines
        if line["kind"] == "result" and line["case"]["mode"] == "step" and line["step_ms"] and not line["error"]
    ]
    sweeps = _grouped(steps, lambda result: points.config_of(result["case"]))
    sweeps = {config: sweep for config, sweep in sweeps.items() if len(set(map(_size, sweep))) >= _LEAST_SIZES}
    if not sweeps:
        return []
    largest = max(_size(result) for sweep in sweeps.values() for result in sweep)
    sizes = sorted({round(size) for size in np.geomspace(1, largest, _DRAWN)})
    known = predict.study(points.of_records(lines), None, None, sizes)
    names = ("mean_error", "max_error", "points", "status", "reason")
    found = []
    for config, sweep in sweeps.items():
        case = from_dict(sweep[0]["case"])
        rates = {one["devices"]: one["throughput"] for one in known["predictions"] if one["config"] == config}
        unit = sweep[0]["units_per_example"]
        fields = {
            "model": f"scaling: {known['fit']['status']}",
            "parameters": {name: value for name, value in known["fit"].items() if name not in (*names, "held_out")},
            "error": {"mean": known["fit"]["mean_error"], "max": known["fit"]["max_error"]},
            "points": known["fit"]["points"],
            **{"key": case.scaling_key, "per_replica_batch": case.per_replica_batch},
        }
        if known["fit"]["status"] != "unexplained":
            fields["curve"] = [[size, rates[size] * unit] for size in sizes if size <= max(map(_size, sweep))]
        found.append(fields)
    return found


def _size(result: Record) -> int:
    return result["case"]["workers"] * result["case"]["replicas"]


def _grouped(items: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
