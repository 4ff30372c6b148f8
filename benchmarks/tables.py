"""The tables of a report: what a record says, in words and units. A missing value is a dash and never a 0."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.statistics import Launches, ratio

DASH = "—"
_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
PARTS = {  # of breakdown_ms, as readers call them
    "compute": "compute",
    "comm_exposed": "exposed communication",
    "input_wait": "input wait",
    "host_gap": "host gap",
    "optimizer": "optimizer",
    "eval": "evaluations",
    "save": "checkpoints",
}
PEER_NAMES = {
    "distloop": "distloop",
    "loop": "hand-written loop",
    "loop_in_graph": "hand-written loop in graph",
    "fit": "Keras fit",
    "fit_many": "Keras fit, many steps a call",
    "orbit": "Orbit",
}
_MODES = {
    "step": "the batch stays on the device",
    "h2d": "the batch comes from host memory",
    "input": "batches are read and not used",
    "comm": "gradients are only exchanged",
    "nocomm": "gradients are not exchanged",
    "noupdate": "gradients are neither exchanged nor applied",
    "e2e": "real data, from its files to the logs",
    "startup": "until the first step",
}


class Cell(NamedTuple):
    """Hold a value and, in small print, its interval, its reason or its source."""

    text: str
    note: str = ""


class Table(NamedTuple):
    """Hold a table; the first column names the row, the last one is its record."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def number(value: float | None) -> str:
    """Return a number with four digits or all those before its point, such as 12,346 or 0.01235."""
    if value is None:
        return DASH
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 12)}f}"


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal."""
    return DASH if value is None else f"{100 * value:.1f}{_SPACE}%"


def gib(size: float | None) -> str:
    """Return bytes as GiB."""
    return DASH if size is None else f"{size / 2**30:,.4g}{_SPACE}GiB"


def replicas_of(case: Mapping[str, Any]) -> int:
    """Return the number of replicas over all workers."""
    return case["workers"] * case["replicas"]


def settings_of(case: Mapping[str, Any]) -> str:
    """Return the settings that are not the defaults, as on a command line."""
    return " ".join(f"{name}={value}" for name, value in case["settings"].items())


def size_of(case: Mapping[str, Any]) -> str:
    """Return how many replicas, such as "8 replicas"."""
    count = replicas_of(case)
    return f"{count} replica{'s' if count > 1 else ''}"


def label(case: Mapping[str, Any], *, with_peer: bool = True) -> str:
    """Return a case in a few words."""
    peer = PEER_NAMES[case["peer"]] if with_peer and case["peer"] != "distloop" else ""
    return ", ".join(filter(None, [case["workload"], case["mode"], peer, size_of(case), settings_of(case)]))


def source(record: Mapping[str, Any]) -> Cell:
    """Return where a row comes from: the id of its run, its file and line."""
    return Cell(record["run"], f"{record['file']}:{record['line']}")


def speeds(results: Sequence[Mapping[str, Any]], device: str) -> Table:
    """Return the main table: one row a result."""
    sizes = {result["key"]: size_of(result["case"]) for result in results}
    columns = (
        "workload",
        "mode",
        "peer",
        "replicas",
        "batch a replica",
        "throughput",
        "per device",
        "efficiency",
        "step, ms",
        "exposed comm., ms",
        "input wait, ms",
        "MFU",
        "memory",
        "start-up, s",
        "record",
    )
    rows = [_speed(result, sizes, device) for result in results]
    modes = dict.fromkeys(result["case"]["mode"] for result in results)
    about = (
        "Medians over launches of medians over windows, with 95 % bootstrap intervals; throughput is that of all "
        "replicas, and the slowest worker counts; start-up is until the end of the first step. "
        f"Modes: {'; '.join(f'{mode}: {_MODES[mode]}' for mode in modes)}."
    )
    return Table("Speed", about, columns, rows)


def _speed(result: Mapping[str, Any], sizes: Mapping[str, str], device: str) -> list[Cell]:
    case = result["case"]
    shape = f"{case['workers']} workers x {case['replicas']}" if case["workers"] > 1 else ""
    step = result["step_ms"]
    parts = result["breakdown_ms"] or {}
    wait = parts.get("input_wait")
    failure = f"failed: {result['error']}" if result["error"] else ""
    return [
        Cell(case["workload"], settings_of(case)),
        Cell(case["mode"]),
        Cell(PEER_NAMES[case["peer"]]),
        Cell(str(replicas_of(case)), shape),
        Cell(str(case["per_replica_batch"])),
        _interval(result["throughput"], f"{result['unit']}/s", missing=failure),
        Cell(number(result["per_device"])),
        _efficiency(result["efficiency"], sizes),
        _interval(step),
        Cell(number(parts.get("comm_exposed"))),
        Cell(number(wait), percent(wait / step["median"]) if wait is not None and step else ""),
        _utilization(result, device),
        _memory(result["memory"]),
        Cell(number(_sum(result["startup_s"]))),
        source(result),
    ]


def _interval(interval: Mapping[str, float] | None, unit: str = "", missing: str = "") -> Cell:
    if interval is None:
        return Cell(DASH, missing)
    text = f"{number(interval['median'])}{_SPACE}{unit}" if unit else number(interval["median"])
    return Cell(text, f"{number(interval['low'])} to {number(interval['high'])}")


def _efficiency(efficiency: Mapping[str, Any] | None, sizes: Mapping[str, str]) -> Cell:
    if efficiency is None:
        return Cell(DASH)
    baseline = sizes.get(efficiency["baseline"], efficiency["baseline"])
    return Cell(percent(efficiency["value"]), f"{efficiency['kind']}, of {baseline}")


def _utilization(result: Mapping[str, Any], device: str) -> Cell:
    flops = result["flops"]
    if result["error"]:
        return Cell(DASH)
    if flops is None:
        return Cell(DASH, "FLOPs not counted")
    if flops["peak"] is None:
        return Cell(DASH, f"no peak known of {device}")
    return Cell(percent(flops["mfu"]), f"{number(flops['per_example'] / 1e9)} GFLOP each")


def _memory(memory: Mapping[str, Any] | None) -> Cell:
    if memory is None:
        return Cell(DASH)
    host = f"host {gib(memory['host_peak_bytes'])}"
    if memory["device_peak_bytes"] is None:
        return Cell(DASH, f"device not told; {host}")
    return Cell(gib(memory["device_peak_bytes"]), host)


def _sum(parts: Mapping[str, float | None] | None) -> float | None:
    """Return the sum of the parts, None if one is missing."""
    known = [part for part in parts.values() if part is not None] if parts else []
    return sum(known) if parts and len(known) == len(parts) else None


def steps(results: Iterable[Mapping[str, Any]]) -> Table:
    """Return where a step goes, and how much it varies, for results that have been split."""
    columns = ("case", *PARTS.values(), "p5", "p50", "p95", "p99", "cv", "skew", "record")
    rows = []
    for result in results:
        step, skew = result["step_ms"], result["skew_ms"]
        row = [Cell(label(result["case"]))]
        row += [Cell(number(result["breakdown_ms"].get(part))) for part in PARTS]
        row += [Cell(number(step[name])) for name in ("p5", "p50", "p95", "p99")]
        jitter = f"jitter {skew['jitter']:.3g}" if skew else ""
        row += [Cell(percent(step["cv"])), Cell(number(skew["persistent"]) if skew else DASH, jitter)]
        rows.append([*row, source(result)])
    about = "In ms; percentiles and variation are those of windows; skew is of the slowest worker against the mean."
    return Table("Where a step goes", about, columns, rows)


def startup(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the parts of the time until the end of the first step, of results that have them."""
    parts = dict.fromkeys(part for result in results for part in result["startup_s"])
    rows = [
        [Cell(label(result["case"])), *(Cell(number(result["startup_s"].get(part))) for part in parts), source(result)]
        for result in results
    ]
    names = [part.replace("_", " ") for part in parts]
    return Table("Start-up", "In s, one after the other.", ("case", *names, "record"), rows)


def peers(results: Sequence[Mapping[str, Any]], times: Mapping[str, Launches]) -> Table:
    """Return the peers of one case; `times` has milliseconds a step by the key of a case, for distloop's lead."""
    ours = [times.get(result["key"]) for result in results if result["case"]["peer"] == "distloop"]
    rows = []
    for result in results:
        rate, losses, theirs = result["throughput"], result.get("losses"), times.get(result["key"])
        failure = f"failed: {result['error']}" if result["error"] else ""
        lead = ratio(ours[0], theirs) if ours and ours[0] and theirs and result["case"]["peer"] != "distloop" else None
        rows.append(
            [
                Cell(PEER_NAMES[result["case"]["peer"]]),
                _interval(rate, f"{result['unit']}/s", missing=failure),
                Cell(f"{lead.median:.3f}", f"{lead.low:.3f} to {lead.high:.3f}") if lead else Cell(DASH),
                Cell(number(losses[-1]), f"after {len(losses)} steps") if losses else Cell(DASH),
                source(result),
            ]
        )
    about = (
        "The same model, data, batch, precision and optimizer; equal losses show that all did the same work. "
        "Lead: how many times faster distloop is."
    )
    columns = ("peer", "throughput", "lead of distloop", "loss", "record")
    return Table(f"Peers on {label(results[0]['case'], with_peer=False)}", about, columns, rows)


def communication(points: Iterable[Mapping[str, Any]]) -> Table:
    """Return the all-reduces by size."""
    rows = [
        [
            Cell(f"{point['bytes']:,}"),
            Cell(str(point["tensors"])),
            Cell(str(point["replicas"]), f"{point['hosts']} host{'s' if point['hosts'] > 1 else ''}"),
            _interval({name: 1e3 * point["seconds"][name] for name in ("median", "low", "high")}, "ms"),
            Cell(f"{number(point['algbw'] / 1e9)} GB/s"),
            Cell(f"{number(point['busbw'] / 1e9)} GB/s"),
            Cell(point.get("what", DASH)),
            source(point),
        ]
        for point in points
    ]
    about = "Algorithm bandwidth is size / time; bus bandwidth is that times 2 (n - 1) / n for n replicas."
    columns = ("bytes", "tensors", "replicas", "time", "algorithm bandwidth", "bus bandwidth", "what", "record")
    return Table("All-reduce", about, columns, rows)


def fits(records: Iterable[Mapping[str, Any]]) -> Table:
    """Return the models that were fitted."""
    rows = [
        [
            Cell(fit["model"]),
            Cell(_listed(fit["parameters"])),
            Cell(_listed(fit["error"])),
            Cell(str(fit["points"])),
            source(fit),
        ]
        for fit in records
    ]
    return Table("Fits", "Lines of the figures.", ("model", "parameters", "error", "points", "record"), rows)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_listed(value)})"
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
