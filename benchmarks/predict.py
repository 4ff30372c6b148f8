"""Predict the throughput of larger machines, from a table of measured sizes or from records of runs.

    python -m benchmarks.predict --table=T.csv --gradient_bytes=440e6 --devices_per_host=8 --fit_up_to=16 --at=32,64

The table has the columns config,devices,hosts,per_replica_batch,throughput (examples a second of all devices).
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import command, points, records, simulate
from benchmarks.fitting import TERMS, Point
from benchmarks.study import Reliability, study
from distloop.errors import UsageError

_STEP_CV = 0.01  # launches of one published configuration vary by 0.2 to 1.5 %


class Measured(NamedTuple):
    """What --table or --runs hold; a table has steps only."""

    points: list[Point]
    input_rates: dict[str, float]  # examples a second of a host, by configuration
    worker_times: list[float]  # step times of a replica by itself, relative to their mean


def main() -> None:
    """Run `python -m benchmarks.predict`."""
    command.define(flags.DEFINE_string, "table", None, "CSV of config,devices,hosts,per_replica_batch,throughput")
    command.define(flags.DEFINE_list, "runs", [], "files or folders of records instead of a table")
    command.define(flags.DEFINE_float, "gradient_bytes", None, "bytes that a step reduces, for all rows of the table")
    command.define(
        flags.DEFINE_integer,
        "devices_per_host",
        None,
        "devices that a host has: at most in the table, and as many "
        "at the sizes of --at, unless all rows of several hosts have another number",
        lower_bound=1,
    )
    command.define(flags.DEFINE_integer, "fit_up_to", None, "devices of the largest rows to fit; larger are compared")
    command.define(flags.DEFINE_list, "at", [], "numbers of devices to predict (default: twice the largest fitted)")
    command.define(flags.DEFINE_boolean, "json", False, "print one JSON object instead of a table")
    command.define(
        flags.DEFINE_float,
        "input_rate",
        None,
        "examples a second that a host reads (default: of the `input` results of --runs; else no bound)",
    )
    command.define(flags.DEFINE_float, "mtbf_hours", None, "mean time between failures of one device: adds goodput")
    command.define(flags.DEFINE_float, "checkpoint_secs", 0.0, "seconds for which a checkpoint stops the steps")
    command.define(flags.DEFINE_float, "restart_secs", 0.0, "seconds from a failure until steps go on")
    command.define(
        flags.DEFINE_float,
        "step_cv",
        None,
        "deviation of a device's step time, relative, for the goodput "
        "(default: that of the windows of --runs; else 0.01)",
    )
    command.run(_predict)


def _predict(arguments: list[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; settings are flags, such as --at=32: see --help.")
    values = flags.FLAGS
    given = measured(values.table, values.runs, values.gradient_bytes, values.devices_per_host)
    found = study(
        given.points,
        values.devices_per_host,
        values.fit_up_to,
        sizes(values.at),
        input_rates=input_rates(given, values.input_rate),
        failing=reliability(
            values.mtbf_hours, values.checkpoint_secs, values.restart_secs, values.step_cv, given.worker_times
        ),
    )
    if values.json:
        print(json.dumps(found, allow_nan=False))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def measured(
    table: str | None, runs: Sequence[str], gradient_bytes: float | None, devices_per_host: int | None
) -> Measured:
    """Return the measurements of --table or of --runs. Raises UsageError for both, for none and for what they lack."""
    if bool(table) == bool(runs):
        raise UsageError("expected either --table=T.csv or --runs=RECORDS.")
    if not table:
        lines = records.read([Path(path) for path in runs])
        return Measured(points.of_records(lines), points.input_rates(lines), points.worker_times(lines))
    if gradient_bytes is None or not 0 < gradient_bytes < math.inf:
        raise UsageError(f"gradient_bytes is {gradient_bytes}; expected a number above 0, such as 440e6.")
    if devices_per_host is None:
        raise UsageError("devices_per_host is not given, and a table does not tell it; expected --devices_per_host=8.")
    return Measured(points.of_table(Path(table), gradient_bytes, devices_per_host), {}, [])


def input_rates(given: Measured, stated: float | None) -> dict[str, float]:
    """Return the examples a second of each host's input, by configuration: as stated, or else as measured."""
    if stated is None:
        return given.input_rates
    if not 0 < stated < math.inf:
        raise UsageError(f"input_rate is {stated:g}; expected the examples a second of a host, above 0.")
    return {point.config: stated for point in given.points if point.config is not None}


def sizes(texts: Sequence[str]) -> list[int]:
    """Return the numbers of devices that --at names."""
    found = []
    for text in texts:
        try:
            size = float(text)
        except ValueError:
            size = math.nan
        if not (1 <= size <= points.MOST_DEVICES and size == int(size)):
            raise UsageError(
                f"at has {text!r}; expected numbers of devices, 1 to {points.MOST_DEVICES:g}, such as --at=32,64."
            )
        found.append(int(size))
    return found


def reliability(
    hours: float | None,
    checkpoint: float,
    restart: float,
    step_cv: float | None = None,
    worker_times: Sequence[float] = (),
) -> Reliability | None:
    """Return what --mtbf_hours, --checkpoint_secs, --restart_secs and --step_cv say, None without the first.

    Without --step_cv a device is as in `worker_times`, measured step times relative to their mean, if there are any.
    """
    if hours is None:
        if checkpoint or restart or step_cv is not None:
            raise UsageError(
                "checkpoint_secs, restart_secs and step_cv need --mtbf_hours, the time between failures of a device."
            )
        return None
    if not (0 < hours < math.inf and 0 < checkpoint < math.inf and 0 <= restart < math.inf):
        raise UsageError(
            "expected --mtbf_hours and --checkpoint_secs above 0, and --restart_secs of 0 or more; "
            f"they are {hours:g}, {checkpoint:g} and {restart:g}."
        )
    if step_cv is not None and not 0 <= step_cv < 1:
        raise UsageError(
            f"step_cv is {step_cv:g}; expected a deviation relative to the step, from 0 to 1, such as 0.01."
        )
    if step_cv is None and len(worker_times):
        worker = simulate.measured(worker_times)
    else:
        worker = simulate.lognormal(mean=1.0, cv=_STEP_CV if step_cv is None else step_cv)
    return Reliability(hours * 3600, checkpoint, restart, worker)


def show(found: dict[str, Any], console: Console) -> None:
    """Print the predictions as a table, with what the fit found and what it could not find."""
    measured = {(row["config"], row["devices"]): row for row in found["fit"]["held_out"]}
    reliable = "goodput" in found["predictions"][0]
    table = Table("configuration", "devices", "throughput", "95 % band", "decided most by")
    table.box = box.SIMPLE
    for title in ("measured", "error") if measured else ():
        table.add_column(title)
    for title in ("sustained", "goodput", "checkpoint every") if reliable else ():
        table.add_column(title)
    for row in found["predictions"]:
        held = measured.get((row["config"], row["devices"]))
        cells = [
            *(row["config"], str(row["devices"]), f"{row['throughput']:.5g}", f"{row['low']:.5g} - {row['high']:.5g}"),
            row["dominant"],
        ]
        if measured:
            cells += [f"{held['throughput']:.5g}", f"{held['error']:+.1%}"] if held else ["", ""]
        if reliable:
            cells += [f"{row['sustained']:.5g}", f"{row['goodput']:.1%}", f"{row['checkpoint_every_seconds']:.0f} s"]
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
    if fit["left_out"]:
        said.append(f"Not predicted, as all their rows are above --fit_up_to: {', '.join(fit['left_out'])}.")
    if fit["held_out"]:
        outside = sum(not row["in_band"] for row in fit["held_out"])
        said.append(
            f"{len(fit['held_out'])} points held out: errors {fit['held_out_mean_error']:.1%} on average, "
            f"{outside} outside of the band."
        )
    return [line for line in said if line]


if __name__ == "__main__":
    main()
