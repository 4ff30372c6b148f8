"""Which worker's failure was the first, and one screen about it. Pure, but for reading what workers have left."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_KEYS = {"host", "phase", "step", "summary", "message", "traceback", "time", "exit_code", "collateral"}
_LINES = 20  # of the log, where there is no traceback


class Failure(NamedTuple):
    """Say how one worker failed: `when` is a time of this host's clock, in seconds."""

    rank: int
    host: str
    phase: str
    step: int | None  # the last that it had done, None if it had not begun
    what: str  # one clause, such as `RuntimeError: no more disks` or `was killed by SIGKILL`
    log: str  # path
    when: float
    code: int
    error: str | None = None  # type and message of an exception
    details: str = ""  # a traceback, the stacks of a worker that hung, or the last lines of the log
    collateral: bool = False  # it only followed from another worker's failure


def first(failures: Sequence[Failure]) -> Failure:
    """Return the cause: the earliest that did not only follow from another one."""
    return min(failures, key=lambda failure: (failure.collateral, failure.when))


def read_record(path: Path, message: bytes = b"") -> dict[str, Any] | None:
    """Return the record of the error by which a worker ended, if it has left a whole one, in a file or a message."""
    try:
        record = json.loads(path.read_text() if path.exists() else message)
    except ValueError:  # there is none, or it is that of a program that is not distloop's
        return None
    return record if isinstance(record, dict) and record.keys() >= _KEYS else None


def text(failure: Failure, *, why_no_restart: str = "") -> str:
    """Return the screen that is printed last: the details first, then who, where and why, then where to read on."""
    # A program that is not distloop's never tells more than that it was started.
    where = "" if failure.step is None else f" in {failure.phase}"
    if failure.step is not None and failure.phase != "setup":
        where += f" after step {failure.step}"
    return "\n".join(
        line
        for line in (
            failure.details.rstrip(),
            f"distloop: rank {failure.rank} on {failure.host}{where}: {failure.what}",
            why_no_restart and f"distloop: {why_no_restart}",
            f"distloop: its log is {failure.log}",
        )
        if line
    )


def as_json(failure: Failure, *, attempt: int, why_no_restart: str) -> str:
    """Return the same as a JSON object."""
    return json.dumps({**failure._asdict(), "attempt": attempt, "why_no_restart": why_no_restart}, indent=2) + "\n"


def last_lines(lines: Sequence[str]) -> str:
    """Return the end of a log for `Failure.details`."""
    return "\n".join(["last lines of its log:", *(f"  {line}" for line in lines[-_LINES:])]) if lines else ""


def stacks(lines: Sequence[str]) -> list[list[str]]:
    """Return the stacks that faulthandler has written among other lines, newest thread first, the main thread last."""
    threads: list[list[str]] = []
    for line in lines:
        if re.match(r"(Current thread|Thread) 0x", line):
            threads.append([line])
        elif threads and line.startswith("  File "):
            threads[-1].append(line)
    return threads


def waits_for_others(threads: Sequence[Sequence[str]]) -> bool:
    """Tell from a worker's stacks whether all it does is to wait in TensorFlow, as the peers of one that hung do."""
    if any("/ops/script_ops.py" in line for stack in threads for line in stack):
        return False  # Python code that a compiled step or an input pipeline has called
    main = threads[-1] if threads else []
    return len(main) > 1 and re.search(r"/tensorflow/python/(eager|framework)/", main[1]) is not None
