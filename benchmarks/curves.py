"""Lines through measured points, as the fields of `fit` records: what a report draws is in its records, too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks import points
from benchmarks.cases import from_dict
from benchmarks.study import study

Record = Mapping[str, Any]
_LEAST_SIZES = 3  # a line through two points says nothing of the model
_DRAWN = 33  # points of a line
_NOT_PARAMETERS = ("status", "mean_error", "max_error", "points", "held_out", "left_out")


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
    """Return what the scaling model says of each sweep, of the run, result and comm_point lines of an invocation.

    What the model does not explain has no curve.
    """
    results = [line for line in lines if line["kind"] == "result" and line["step_ms"]]
    results = [result for result in results if result["case"]["mode"] in ("step", "nocomm")]
    others = [line for line in lines if line["kind"] in ("run", "comm_point")]
    found = []
    for of_config in _grouped(results, lambda result: points.config_of(result["case"])).values():
        sweep = [result for result in of_config if result["case"]["mode"] == "step"]
        sizes = {result["case"]["workers"] * result["case"]["replicas"] for result in sweep}
        if len(sizes) < _LEAST_SIZES:
            continue
        drawn = sorted({round(size) for size in np.geomspace(min(sizes), max(sizes), _DRAWN)})
        known = study(points.of_records([*others, *of_config]), None, None, drawn)
        case = from_dict(sweep[0]["case"])
        unit = sweep[0]["units_per_example"]
        fields = {
            "model": f"scaling: {known['fit']['status']}",
            "parameters": {name: value for name, value in known["fit"].items() if name not in _NOT_PARAMETERS},
            "error": {"mean": known["fit"]["mean_error"], "max": known["fit"]["max_error"]},
            "points": known["fit"]["points"],
            **{"key": case.scaling_key, "per_replica_batch": case.per_replica_batch},
        }
        if known["fit"]["status"] != "unexplained":
            fields["curve"] = [[one["devices"], one["throughput"] * unit] for one in known["predictions"]]
        found.append(fields)
    return found


def _grouped(items: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
