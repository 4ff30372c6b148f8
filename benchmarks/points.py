"""Where the points of the scaling model come from: a table of throughputs (CSV), or records of measured runs."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fitting import Point
from distloop.errors import UsageError

MOST_DEVICES = 10**9  # no machine has more
COLUMNS = ("config", "devices", "hosts", "per_replica_batch", "throughput")
_LEAST_OF_GRADIENTS = 0.1  # smaller messages go by other rules than the gradients do


def of_table(path: Path, gradient_bytes: float, devices_per_host: int) -> list[Point]:
    """Return a point for each row; an empty `hosts` is as few as hold the devices.

    Raises UsageError, with the line, for what is no such table.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(
            f"{path} cannot be read ({why}); expected a table with the columns {','.join(COLUMNS)}."
        ) from None
    rows = [(number, cells) for number, cells in enumerate(csv.reader(lines), 1) if any(cell.strip() for cell in cells)]
    if not rows:
        raise UsageError(f"{path} is empty; expected a table with the columns {','.join(COLUMNS)}.")
    names = [cell.strip().lower() for cell in rows[0][1]]
    if missing := [name for name in COLUMNS if name not in names]:
        raise UsageError(f"{path} has no column {missing[0]!r}; expected {','.join(COLUMNS)}.")
    points = []
    for number, cells in rows[1:]:
        row = dict(zip(names, [cell.strip() for cell in cells], strict=False))
        points.append(_of_row(row, f"{path}, line {number}", gradient_bytes, devices_per_host))
    if not points:
        raise UsageError(f"{path} has no rows; expected one for each measured size.")
    return points


def _of_row(row: Mapping[str, str], where: str, size: float, devices_per_host: int) -> Point:
    config = row.get("config", "")
    if not config:
        raise UsageError(f"{where}: config is empty; expected a name, the same for all sizes of a configuration.")
    devices = _count(row, "devices", where)
    hosts = _count(row, "hosts", where) if row.get("hosts") else math.ceil(devices / devices_per_host)
    if hosts > devices or devices > hosts * devices_per_host or (row.get("hosts") and devices % hosts):
        raise UsageError(
            f"{where}: {devices} devices do not fit {hosts} hosts; expected equally many on each, "
            f"at most {devices_per_host} (--devices_per_host)."
        )
    batch = _positive(row, "per_replica_batch", where)
    return Point(config, devices, hosts, batch, size, devices * batch / _positive(row, "throughput", where))


def _count(row: Mapping[str, str], name: str, where: str) -> int:
    value = _positive(row, name, where)
    if value != int(value) or value > MOST_DEVICES:
        raise UsageError(f"{where}: {name} is {row[name]!r}; expected a whole number, at most {MOST_DEVICES:g}.")
    return int(value)


def _positive(row: Mapping[str, str], name: str, where: str) -> float:
    text = row.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{where}: {name} is {text!r}; expected a number above 0.")
    return value


def of_records(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points of measured runs.

    A `step` result is a step, a `nocomm` result one without communication, and a `comm_point` a communication without
    a step; of a sweep of sizes, those that are not much smaller than the gradients. Raises UsageError without steps.
    """
    hosts = {record["key"]: record["facts"].get("hosts", 1) for record in _of_kind(records, "run")}
    points = []
    for record in _of_kind(records, "result"):
        case = record["case"]
        if case["mode"] not in ("step", "nocomm") or record["error"] is not None or record["step_ms"] is None:
            continue
        size = sum(record["gradient_bytes"].values()) if case["mode"] == "step" else 0.0
        devices = case["workers"] * case["replicas"]
        seconds = record["step_ms"]["median"] / 1e3
        where = hosts.get(record["key"], 1)
        points.append(Point(config_of(case), devices, where, case["per_replica_batch"], size, seconds))
    if not any(point.size > 0 for point in points):
        raise UsageError("the records have no result of a step; expected those of `python -m benchmarks.run`.")
    least = _LEAST_OF_GRADIENTS * min(point.size for point in points if point.size > 0)
    for record in _of_kind(records, "comm_point"):
        if record["bytes"] >= least and record["replicas"] > 1:
            seconds = record["seconds"]["median"]
            points.append(Point(None, record["replicas"], record["hosts"], 1, record["bytes"], seconds))
    return points


def input_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the examples a second that each host reads, by configuration: of `input` results, those of most hosts."""
    hosts = {record["key"]: record["facts"].get("hosts", 1) for record in _of_kind(records, "run")}
    found = [
        record for record in _of_kind(records, "result") if record["case"]["mode"] == "input" and record["step_ms"]
    ]
    return {
        config_of(record["case"]): record["global_batch"] / record["step_ms"]["median"] * 1e3 / hosts[record["key"]]
        for record in sorted(found, key=lambda record: hosts[record["key"]])
    }


def worker_times(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the step times of one replica by itself, relative to the mean of its case, a number for each window.

    Of a replica that is alone, or of many without communication: with it all wait for the slowest.
    """
    alone = {
        record["launch"]: record["key"]
        for record in _of_kind(records, "run")
        if (record["case"]["replicas"], record["case"]["mode"]) == (1, "nocomm")
        or (record["case"]["replicas"], record["case"]["workers"], record["case"]["mode"]) == (1, 1, "step")
    }
    times: dict[str, list[float]] = {}
    for window in _of_kind(records, "window"):
        if window["launch"] in alone:
            times.setdefault(alone[window["launch"]], []).append(window["seconds"] / window["steps"])
    return [second / np.mean(seconds).item() for seconds in times.values() for second in seconds]


def config_of(case: Mapping[str, Any]) -> str:
    """Return a name of all that the points of one scaling curve share."""
    settings = [f"{name}={value}" for name, value in sorted(case["settings"].items())]
    peer = [] if case["peer"] == "distloop" else [case["peer"]]
    return " ".join([case["workload"], f"b{case['per_replica_batch']}", *peer, *settings])


def _of_kind(records: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [record for record in records if record["kind"] == kind]
