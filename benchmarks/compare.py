"""Say whether a run is faster or slower than another one, and what differences this machine can tell at all.

python -m benchmarks.compare BASE NEW --tolerance=0.03
python -m benchmarks.compare --aa RUN

The exit code is 0 if all cases are the same or improved, 1 if one regressed or failed, 2 if one is inconclusive and
needs more launches, 64 if the runs cannot be compared or the tolerance is below the machine's floor.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import cases, command, statistics
from benchmarks.comparison import (
    Pair,
    Run,
    against_itself,
    check_tolerance,
    compare,
    floor_of,
    load,
    machine_floor,
    unmatched,
)
from benchmarks.statistics import Ratio
from distloop.errors import UsageError

_COLORS = {"improved": "green", "same": "", "regressed": "bold red", "inconclusive": "yellow"}
_UNITS = {
    "memory_bytes": ("memory, MiB", 2**-20),
    "startup_s": ("start-up, s", 1),
    "comm_exposed_ms": ("exposed communication, ms", 1),
    "jitter_ms": ("jitter, ms", 1),
}


def define_flags() -> None:
    """Define the flags of the command."""
    define = command.define
    define(flags.DEFINE_float, "tolerance", 0.03, "how much slower is still the same: a share of the throughput")
    define(flags.DEFINE_boolean, "across", False, "compare also what was measured in different environments")
    define(flags.DEFINE_boolean, "aa", False, "compare the launches of one run with each other: the machine's floor")
    define(flags.DEFINE_boolean, "json", False, "print JSON, for machines")


def main(arguments: Sequence[str]) -> int:
    """Compare what the arguments name; return the exit code."""
    values = flags.FLAGS
    if not 0 < values.tolerance < 1:
        raise UsageError(f"tolerance is {values.tolerance:g}; expected a share above 0 and below 1, such as 0.03.")
    if len(arguments) != 2 - values.aa:
        expected = "--aa RUN" if values.aa else "BASE NEW"
        raise UsageError(f"there are {len(arguments)} arguments; expected {expected}: files or folders of records.")
    if values.aa:
        floor = _show_floor(load(arguments[0]), as_json=values.json)
        check_tolerance(values.tolerance, floor)
        return 0
    base, new = map(load, arguments)
    pairs = compare(base, new, values.tolerance, across=values.across)
    if values.json:
        print(json.dumps(_document(base, new, pairs, values.tolerance), indent=2, allow_nan=False))
    else:
        _print(base, new, pairs, values.tolerance)
    return exit_code(base, new, pairs)


def exit_code(base: Run, new: Run, pairs: Sequence[Pair]) -> int:
    """Return 1 if a case regressed or failed, else 2 if one is inconclusive or was not measured again, else 0."""
    found = {pair.verdict for pair in pairs}
    if "regressed" in found or any(new.results[key]["error"] for key in base.steps if key in new.results):
        return 1
    return 2 if "inconclusive" in found or base.steps.keys() - new.results.keys() else 0


def _document(base: Run, new: Run, pairs: Sequence[Pair], tolerance: float) -> dict[str, Any]:
    return {
        "tolerance": tolerance,
        "floor": machine_floor(pair.floor for pair in pairs),
        "pairs": [
            {
                "key": pair.case.key,
                "case": pair.case.to_dict(),
                "launches": pair.launches,
                "throughput": pair.throughput,
                "ratio": _numbers(pair.ratio),
                "verdict": pair.verdict,
                "mann_whitney_p": pair.ratio.p,
                "floor": pair.floor,
                **pair.others,
            }
            for pair in pairs
        ],
        "geometric_mean": _numbers(statistics.geometric_mean([pair.ratio for pair in pairs])) if pairs else None,
        "unmatched": unmatched(base, new),
        "exit_code": exit_code(base, new, pairs),
    }


def _numbers(ratio: Ratio) -> dict[str, float | None]:
    ends = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}


def _print(base: Run, new: Run, pairs: Sequence[Pair], tolerance: float) -> None:
    console = Console(highlight=False)
    table = _table("case", "launches", "base, /s", "new, /s", "new / base", "p", "verdict")
    for pair in pairs:
        table.add_row(
            pair.case.name,
            ", ".join(map(str, pair.launches)),
            *map(_number, pair.throughput),
            _text(pair.ratio),
            "" if pair.ratio.p is None else f"{pair.ratio.p:.2g}",
            _verdict(pair),
            style=_COLORS[pair.verdict],
        )
    if pairs:
        table.add_section()
        table.add_row("geometric mean", "", "", "", _text(statistics.geometric_mean([pair.ratio for pair in pairs])))
    console.print(table)
    measured = {name: unit for name, unit in _UNITS.items() if any(any(pair.others[name]) for pair in pairs)}
    others = _table("case", *(title for title, _ in measured.values()))
    for pair in pairs:
        others.add_row(pair.case.name, *(_change(pair.others[name], unit) for name, (_, unit) in measured.items()))
    console.print(others)
    for name, reason in unmatched(base, new).items():
        console.print(f"{name}: {reason}", markup=False, soft_wrap=True)
    console.print(
        f"Throughput and its 95 % interval; the same is within {tolerance:.2%}. p: Mann and Whitney, of the launches.",
        soft_wrap=True,
    )


def _show_floor(run: Run, *, as_json: bool) -> float:
    """Print what equal launches differ by, case by case; return the floor of the machine."""
    halves = {key: ratio for key, steps in run.steps.items() if (ratio := against_itself(steps))}
    floors = {key: floor_of(run.steps[key]) for key in halves}
    floor = machine_floor(floors.values())
    if floor is None:
        most = max(map(len, run.steps.values()), default=0)
        raise UsageError(
            f"the floor takes {2 * statistics.ENOUGH_LAUNCHES} launches of a case, and the run has {most} at most; "
            f"measure with --launches={2 * statistics.ENOUGH_LAUNCHES}."
        )
    names = {key: cases.from_dict(run.results[key]["case"]).name for key in halves}
    if as_json:
        rows = [{"key": key, "ratio": _numbers(halves[key]), "floor": floors[key]} for key in halves]
        print(json.dumps({"floor": floor, "cases": rows}, indent=2))
    else:
        table = _table("case", "launches", "half / half", "floor")
        for key, ratio in halves.items():
            table.add_row(names[key], str(len(run.steps[key])), _text(ratio), f"{floors[key]:.2%}")
        console = Console(highlight=False)
        console.print(table)
        console.print(f"Equal runs of so many launches differ by up to {floor:.2%} on this machine.", soft_wrap=True)
    return floor


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "verdict") else "right", overflow="fold")
    return table


def _text(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _verdict(pair: Pair) -> str:
    """Return the verdict, and the direction of what is the same and surely not equal."""
    if pair.verdict != "same" or pair.ratio.low <= 1 <= pair.ratio.high:
        return pair.verdict
    return "same, slower" if pair.ratio.high < 1 else "same, faster"


def _change(values: tuple[float | None, float | None], unit: float) -> str:
    return " → ".join("?" if value is None else _number(value * unit) for value in values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    define_flags()
    command.run(main)
