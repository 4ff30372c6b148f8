"""Predict the throughput of larger machines, from a table of measured sizes or from records of runs.

    python -m benchmarks.predict --table=T.csv --gradient_bytes=440e6 --devices_per_host=8 --fit_up_to=16 --at=32,64

The table has the columns config,devices,hosts,per_replica_batch,throughput (examples a second of all devices).
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import command, explained, points, records, simulate
from benchmarks.explained import Explanation
from benchmarks.fitting import TERMS, Point, Prediction
from distloop.errors import UsageError


@dataclass(frozen=True)
class Reliability:
    """What the machines do to a long run: seconds between failures of one device, of a checkpoint, of a restart."""

    mtbf: float
    checkpoint: float
    restart: float


def main() -> None:
    """Run `python -m benchmarks.predict`."""
    command.define(flags.DEFINE_string, "table", None, "CSV of config,devices,hosts,per_replica_batch,throughput")
    command.define(flags.DEFINE_list, "runs", [], "files or folders of records instead of a table")
    command.define(flags.DEFINE_float, "gradient_bytes", None, "bytes that a step reduces, for all rows of the table")
    command.define(flags.DEFINE_integer, "devices_per_host", None, "devices that a host has", lower_bound=1)
    command.define(flags.DEFINE_integer, "fit_up_to", None, "devices of the largest rows to fit; larger are compared")
    command.define(flags.DEFINE_list, "at", [], "numbers of devices to predict (default: twice the largest fitted)")
    command.define(flags.DEFINE_boolean, "json", False, "print one JSON object instead of a table")
    command.define(flags.DEFINE_float, "mtbf_hours", None, "mean time between failures of one device: adds goodput")
    command.define(flags.DEFINE_float, "checkpoint_secs", 0.0, "seconds for which a checkpoint stops the steps")
    command.define(flags.DEFINE_float, "restart_secs", 0.0, "seconds from a failure until steps go on")
    command.run(_predict)


def _predict(arguments: list[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; settings are flags, such as --at=32: see --help.")
    values = flags.FLAGS
    given = measured(values.table, values.runs, values.gradient_bytes, values.devices_per_host)
    failing = reliability(values.mtbf_hours, values.checkpoint_secs, values.restart_secs)
    found = study(given, values.devices_per_host, values.fit_up_to, sizes(values.at), failing)
    if values.json:
        print(json.dumps(found, allow_nan=False))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def measured(
    table: str | None, runs: Sequence[str], gradient_bytes: float | None, devices_per_host: int | None
) -> list[Point]:
    """Return the points of --table or of --runs. Raises UsageError for both, for none and for what they lack."""
    if bool(table) == bool(runs):
        raise UsageError("expected either --table=T.csv or --runs=RECORDS.")
    if not table:
        return points.of_records(records.read([Path(path) for path in runs]))
    if gradient_bytes is None or not 0 < gradient_bytes < math.inf:
        raise UsageError(f"gradient_bytes is {gradient_bytes}; expected a number above 0, such as 440e6.")
    if devices_per_host is None:
        raise UsageError("devices_per_host is not given, and a table does not tell it; expected --devices_per_host=8.")
    return points.of_table(Path(table), gradient_bytes, devices_per_host)


def sizes(texts: Sequence[str]) -> list[int]:
    """Return the numbers of devices that --at names."""
    found = []
    for text in texts:
        try:
            size = float(text)
        except ValueError:
            size = math.nan
        if not (1 <= size < math.inf and size == int(size)):
            raise UsageError(f"at has {text!r}; expected numbers of devices, at least 1, such as --at=32,64.")
        found.append(int(size))
    return found


def reliability(hours: float | None, checkpoint: float, restart: float) -> Reliability | None:
    """Return what --mtbf_hours, --checkpoint_secs and --restart_secs say, None without the first."""
    if hours is None:
        if checkpoint or restart:
            raise UsageError(
                "checkpoint_secs and restart_secs need --mtbf_hours, the time between failures of a device."
            )
        return None
    if not (0 < hours < math.inf and 0 < checkpoint < math.inf and 0 <= restart < math.inf):
        raise UsageError(
            "expected --mtbf_hours and --checkpoint_secs above 0, and --restart_secs of 0 or more; "
            f"they are {hours:g}, {checkpoint:g} and {restart:g}."
        )
    return Reliability(hours * 3600, checkpoint, restart)


def study(
    given: Sequence[Point],
    devices_per_host: int | None,
    fit_up_to: int | None,
    at: Sequence[int],
    failing: Reliability | None = None,
) -> dict[str, Any]:
    """Fit the points of at most `fit_up_to` devices; return the fit and the predictions at these sizes as JSON values.

    Sizes beyond one host have hosts as full as those of the points. Raises UsageError if there is nothing to fit.
    """
    largest = max(point.devices for point in given) if fit_up_to is None else fit_up_to
    fitted = [point for point in given if point.devices <= largest]
    configs = [name for name in dict.fromkeys(point.config for point in fitted) if name is not None]
    if not configs:
        smallest = min(point.devices for point in given if point.config is not None)
        raise UsageError(
            f"fit_up_to is {largest}, and the smallest row has {smallest} devices; there is nothing to fit."
        )
    known = explained.explain(fitted)
    held_out = [_compare(known, point) for point in given if point.devices > largest and point.config in configs]
    outside = [row["devices"] for row in held_out if not row["in_band"]]
    said = explained.contradicted(known, given, min(outside)) if outside else known
    full = _devices_per_host(given, devices_per_host)
    predictions = []
    for config in configs:
        own = [point for point in given if point.config == config]
        for devices in at or [2 * known.fit.largest]:
            hosts = math.ceil(devices / full)
            batch = _batch(own, devices, largest)
            found = explained.foretell(known, config, devices, hosts, batch, max(point.size for point in own))
            if outside and devices >= min(outside):
                found = found._replace(dominant=said.status)
            predictions.append(_as_json(config, devices, batch, found, failing))
    return {"fit": _fit_as_json(said, held_out), "predictions": predictions}


def _devices_per_host(given: Sequence[Point], stated: int | None) -> int:
    """Return how many devices a full host has: what all points of several hosts have, or else what is stated."""
    several = {math.ceil(point.devices / point.hosts) for point in given if point.hosts > 1}
    if len(several) == 1:
        return several.pop()
    return stated or max(math.ceil(point.devices / point.hosts) for point in given)


def _batch(own: Sequence[Point], devices: int, largest: int) -> float:
    """Return the examples a replica at a size: as measured there, as the one global batch gives, or as at `largest`."""
    if same := [point.batch for point in own if point.devices == devices]:
        return same[0]
    if len({point.devices * point.batch for point in own}) == 1 and len({point.batch for point in own}) > 1:
        return own[0].devices * own[0].batch / devices
    return max((point for point in own if point.devices <= largest), key=lambda point: point.devices).batch


def _as_json(config: str, devices: int, batch: float, found: Prediction, failing: Reliability | None) -> dict[str, Any]:
    examples = devices * batch
    fields = {
        "config": config,
        "devices": devices,
        "throughput": examples / found.seconds,
        "low": examples / found.high,
        "high": examples / found.low,
        "dominant": found.dominant,
    }
    return fields | (_goodput(devices, found.seconds, failing) if failing else {})


def _goodput(devices: int, seconds: float, failing: Reliability) -> dict[str, float]:
    mtbf = failing.mtbf / devices
    every = max(1, round(simulate.best_interval(failing.checkpoint, mtbf) / seconds))
    share = simulate.goodput(
        np.array([every * seconds]),  # all steps are equal: those between two checkpoints are as one
        simulate.Failures(mtbf, failing.restart),
        checkpoint=failing.checkpoint,
        every=1,
        rng=np.random.default_rng(0),
    )
    return {"goodput": share, "checkpoint_every_steps": every, "checkpoint_every_seconds": every * seconds}


def _compare(known: Explanation, point: Point) -> dict[str, Any]:
    found = explained.foretell(known, point.config or "", point.devices, point.hosts, point.batch, point.size)
    examples = point.devices * point.batch
    return {
        "config": point.config,
        "devices": point.devices,
        "throughput": examples / point.seconds,
        "predicted": examples / found.seconds,
        "error": point.seconds / found.seconds - 1,  # of the predicted throughput
        "in_band": found.low <= point.seconds <= found.high,
    }


def _fit_as_json(known: Explanation, held_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fit = known.fit
    value = {name: scale * TERMS[name].unit for name, scale in fit.terms.items()}
    return {
        "status": known.status,
        "reason": known.reason,
        "points": len(fit.points),
        "mean_error": fit.mean_error,
        "max_error": max(abs(error) for error in fit.errors),
        "compute_seconds_per_example": fit.compute,
        "inter_host_bytes_per_second": 1 / value["across"] if value["across"] else None,
        "intra_host_bytes_per_second": 1 / value["inside"] if value["inside"] else None,
        "start_up_seconds": value["start"],
        "hop_seconds": value["hop"],
        "overlap": value["overlap"],
        "straggler_deviation": value["straggler"],
        "fixed": [name for name in TERMS if name not in fit.free],
        "limits": known.limits,
        "held_out": held_out,
        "held_out_mean_error": float(np.mean([abs(row["error"]) for row in held_out])) if held_out else None,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the predictions as a table, with what the fit found and what it could not find."""
    measured = {(row["config"], row["devices"]): row for row in found["fit"]["held_out"]}
    reliable = "goodput" in found["predictions"][0]
    table = Table("configuration", "devices", "throughput", "95 % band", "measured", "error", "decided most by")
    table.box = box.SIMPLE
    for title in ("goodput", "checkpoint every") if reliable else ():
        table.add_column(title)
    for row in found["predictions"]:
        held = measured.get((row["config"], row["devices"]))
        cells = [
            *(row["config"], str(row["devices"]), f"{row['throughput']:.5g}", f"{row['low']:.5g} - {row['high']:.5g}"),
            *((f"{held['throughput']:.5g}", f"{held['error']:+.1%}") if held else ("", "")),
            row["dominant"],
        ]
        if reliable:
            cells += [f"{row['goodput']:.1%}", f"{row['checkpoint_every_seconds']:.0f} s"]
        table.add_row(*cells)
    console.print(table)
    for line in _said(found["fit"]):
        console.print(line, highlight=False, soft_wrap=True)


def _said(fit: dict[str, Any]) -> list[str]:
    """Return the sentences below the table."""
    rates = {
        "inter-host": fit["inter_host_bytes_per_second"],
        "intra-host": fit["intra_host_bytes_per_second"],
    }
    parts = [f"{name} {rate / 1e9:.3g} GB/s" for name, rate in rates.items() if rate]
    parts += [f"start-up {fit['start_up_seconds'] * 1e3:.3g} ms", f"a hop {fit['hop_seconds'] * 1e6:.3g} us"]
    parts += [f"overlap {fit['overlap']:.0%}", f"stragglers {fit['straggler_deviation']:.1%}"]
    said = [
        fit["reason"],
        f"{fit['points']} points fitted: errors {fit['mean_error']:.1%} on average, {fit['max_error']:.1%} at most.",
        f"Found or assumed: {', '.join(parts)}.",
        f"Assumed, as these points do not tell: {', '.join(TERMS[name].title for name in fit['fixed']) or 'nothing'}.",
    ]
    if fit["held_out"]:
        outside = sum(not row["in_band"] for row in fit["held_out"])
        said.append(
            f"{len(fit['held_out'])} points held out: errors {fit['held_out_mean_error']:.1%} on average, "
            f"{outside} outside of the band."
        )
    return [line for line in said if line]


if __name__ == "__main__":
    main()
