"""Measure: each case in fresh processes, launches of all cases in turn, every number with its record.

python -m benchmarks.run --mode=step --workload=mnist_cnn
python -m benchmarks.run --mode=sweep --workload=mnist_cnn --workers=1,2
python -m benchmarks.run --mode=peers --workload=mnist_cnn
"""

import ast
import contextlib
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import breakdown, cases, command, modes, records, runner, tables
from benchmarks.launches import Hosts
from benchmarks.timing import Timing
from distloop import tasks
from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.flags import define_config_flags

# Settings that are a case's own, or of files that a measurement has elsewhere.
_NOT_SETTINGS = (
    *("task", "workdir", "strategy", "replicas", "global_batch_size"),
    *("data_service", "init_from", "keep_checkpoints", "best_metric", "best_mode"),
)


def define_flags() -> None:
    """Define the flags of the command."""
    define = command.define
    define(flags.DEFINE_enum, "mode", "step", "what to measure", enum_values=modes.NAMES)
    define(flags.DEFINE_string, "workload", "mnist_cnn", "a task of the library, or your own as for --task")
    define(flags.DEFINE_list, "workers", ["1"], "processes; several numbers make several cases")
    define(flags.DEFINE_list, "replicas", ["1"], "replicas in each process; several numbers make several cases")
    define(flags.DEFINE_integer, "batch", 64, "examples a replica a step (of all replicas with --scaling=strong)")
    define(flags.DEFINE_enum, "scaling", "weak", "of a sweep", enum_values=["weak", "strong"])
    define(flags.DEFINE_boolean, "split", True, "measure what a step consists of, by steps that leave a part out")
    define(flags.DEFINE_list, "peers", list(cases.PEERS), "for --mode=peers")
    define(flags.DEFINE_multi_string, "vary", [], "for --mode=ablate: SETTING=VALUE|VALUE, again for each setting")
    define(flags.DEFINE_list, "comm_bytes", ["1e3", "1e4", "1e5", "1e6", "1e7"], "for --mode=comm: sizes to sum")
    define(flags.DEFINE_integer, "launches", 5, "fresh processes a case; the unit of all statistics", lower_bound=1)
    define(flags.DEFINE_integer, "windows", 40, "timing windows a launch", lower_bound=1)
    define(flags.DEFINE_float, "window_secs", 0.25, "shortest window", lower_bound=0)
    define(flags.DEFINE_float, "warmup_secs", 20.0, "longest warm-up", lower_bound=0)
    define(flags.DEFINE_float, "limit_secs", 900.0, "longest launch, all in all", lower_bound=0)
    define(flags.DEFINE_list, "hosts", [], "names of all hosts, as for launch.run; run the same command on each")
    define(flags.DEFINE_integer, "host_index", None, "which of --hosts this is, from 0")
    define(flags.DEFINE_string, "output", None, "folder for the records (default: a new one in benchmark_runs)")
    define_config_flags(but=_NOT_SETTINGS)


def main(arguments: Sequence[str]) -> int:
    """Measure what the flags say. Return 1 if a case failed that is not a peer's."""
    if arguments:
        raise UsageError(f"there are arguments that are no flags: {' '.join(arguments)}; see --help.")
    values = flags.FLAGS
    tasks.find(values.workload)
    wanted = modes.plan(
        values.mode,
        values.workload,
        sizes=list(itertools.product(_numbers("workers"), _numbers("replicas"))),
        batch=values.batch,
        settings=_settings(),
        strong=values.scaling == "strong",
        split=values.split,
        peers=_peers(values.peers),
        vary=_variations(values.vary),
        comm_bytes=[round(_number(text, "comm_bytes")) for text in values.comm_bytes],
    )
    hosts = _hosts(wanted)
    now = datetime.now(timezone.utc).strftime("%Y%m%d_%H%M%S")
    output = Path(values.output or f"benchmark_runs/{now}_{values.mode}")
    output.mkdir(parents=True, exist_ok=True)
    run = records.new_id()
    with tempfile.TemporaryDirectory(prefix="distloop_bench_") as own:
        # The first host writes the records; all leave their numbers where it finds them.
        recorder = records.Recorder((Path(own) if hosts.index else output) / f"{run}.jsonl", run)
        asked = runner.Asked(
            values.launches,
            Timing(values.windows, values.window_secs, values.warmup_secs),
            hosts,
            output / "launches" if hosts.names else Path(own),
            values.limit_secs,
            ["python", "-m", "benchmarks.run", *sys.argv[1:]],
        )
        found = runner.run(wanted, recorder, asked, lambda line: print(line, flush=True))
    _show(found, {case.key for case in (one.case for one in wanted)})
    print(f"records: {output / run}.jsonl\nreport:  python -m benchmarks.report {output}")
    return int(any(result["error"] for result in found if result["case"]["peer"] == "distloop"))


def _show(found: Sequence[dict[str, Any]], wanted: set[str]) -> None:
    """Print what was asked for: how fast, and what bounds it."""
    table = Table("what", "units/s", "95 % interval", "ms a step", "bound by")
    for result in (result for result in found if result["key"] in wanted):
        what = tables.label(result["case"])
        if result["error"]:
            table.add_row(what, "failed", result["error"])
            continue
        rate, verdict = result["throughput"], breakdown.judge(result)
        interval = f"{tables.number(rate['low'])} to {tables.number(rate['high'])}"
        step = tables.number(result["step_ms"]["median"])
        table.add_row(what, tables.number(rate["median"]), interval, step, verdict.bound if verdict else "")
    Console().print(table)


def _hosts(wanted: Sequence[modes.Wanted]) -> Hosts:
    names, index = flags.FLAGS.hosts, flags.FLAGS.host_index
    if not names:
        return Hosts()
    if index not in range(len(names)) or flags.FLAGS.output is None:
        raise UsageError(
            f"hosts names {len(names)} hosts; give each its --host_index, from 0, and all the same --output, a folder "
            "that they share."
        )
    for case in modes.unique(wanted):
        if case.workers % len(names):
            raise UsageError(f"{case.workers} workers cannot be shared by {len(names)} hosts; give a multiple.")
    return Hosts(names, index)


def _settings() -> dict[str, Any]:
    """Return the settings of a run that the flags give, without those that are as they are by default."""
    given: dict[str, Any] = {
        setting.name: flags.FLAGS[setting.name].value
        for setting in fields(RunConfig)
        if setting.name not in _NOT_SETTINGS and flags.FLAGS[setting.name].value != setting.default
    }
    RunConfig(**given)
    if given.get("jit_compile") == "auto":
        raise UsageError("jit_compile is auto; measure both instead: --mode=ablate --vary='jit_compile=0|1'.")
    return given


def _variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    found = [_variation(text) for text in texts]
    if len(dict(found)) < len(found):
        raise UsageError(f"vary names a setting twice ({', '.join(texts)}); give all its values in one: A|B.")
    return dict(found)


def _variation(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    known = [setting.name for setting in fields(RunConfig) if setting.name not in _NOT_SETTINGS]
    if not equals or name not in known:
        raise UsageError(f"vary is {text!r}; expected SETTING=VALUE|VALUE with one of {', '.join(known)}.")
    kind = {setting.name: str(setting.type) for setting in fields(RunConfig)}[name]
    found = [_value(value, kind) for value in values.split("|")]
    for value in found:
        RunConfig(**{name: value})
    return name, found


def _value(text: str, kind: str) -> Any:
    if text == "None" or ("str" in kind and "bool" not in kind):
        return None if text == "None" else text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise UsageError(f"vary has the value {text!r}; expected a number, as for the flag.") from None
    return bool(value) if "bool" in kind else value


def _peers(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in cases.PEERS:
            raise UsageError(f"there is no peer {name!r}; expected some of {', '.join(cases.PEERS)}.")
    return names


def _numbers(flag: str) -> list[int]:
    texts: Any = flags.FLAGS[flag].value
    found = [_number(text, flag) for text in texts]
    if not found or any(number < 1 or number != int(number) for number in found):
        raise UsageError(f"{flag} is {','.join(texts)}; expected whole numbers of at least 1.")
    return [int(number) for number in found]


def _number(text: str, flag: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise UsageError(f"{flag} has {text!r}; expected a number.")


if __name__ == "__main__":
    define_flags()
    command.run(main)
