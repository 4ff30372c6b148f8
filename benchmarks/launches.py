"""Launches of cases in fresh processes: the facts and windows that they leave, or the sentence they ended with."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.results import Launch
from benchmarks.timing import Timing


@dataclass(frozen=True)
class Hosts:
    """Say which hosts take part; the same command runs on each of them, and `names` is empty for one host."""

    names: Sequence[str] = ()
    index: int | None = None


class Failed(NamedTuple):
    """Say why a launch has ended without numbers, in a sentence."""

    id: str
    error: str
    argv: list[str]


class Done(NamedTuple):
    """Hold what a launch has found, and the command that repeats it."""

    launch: Launch
    argv: list[str]


def launch(case: Case, timing: Timing, hosts: Hosts, folder: Path, *, limit_secs: float) -> Done | Failed:
    """Measure a case once. Workers on several hosts must share `folder`. No process is left after `limit_secs`."""
    name = records.new_id()
    shared = folder / f"launch_{case.key}_{len(list(folder.glob(f'launch_{case.key}_*')))}" if hosts.names else None
    with tempfile.TemporaryDirectory(prefix="distloop_bench_") as own:
        place = shared or Path(own)
        place.mkdir(exist_ok=True)
        argv = command(case, timing, hosts, place)
        error = _run(argv, limit_secs)
        files = [place / f"rank_{rank}.json" for rank in range(case.workers)]
        if error is None and not all(file.is_file() for file in files):
            error = "a worker ended well and left no numbers."
        if error is not None:
            return Failed(name, error, argv)
        found = [json.loads(file.read_text()) for file in files]
    windows = [{"rank": rank, **window} for rank, worker in enumerate(found) for window in worker["windows"]]
    return Done(Launch(name, _facts([worker["facts"] for worker in found]), windows), argv)


def command(case: Case, timing: Timing, hosts: Hosts, folder: Path) -> list[str]:
    """Return the command that measures a case on this host, its workers' numbers going to `folder`."""
    request = json.dumps({"case": case.to_dict(), "timing": asdict(timing), "folder": str(folder)})
    worker = [sys.executable, "-m", "benchmarks.worker", request]
    if case.workers == 1:
        return worker
    of_hosts = [f"--hosts={','.join(hosts.names)}"] if hosts.names else []
    of_hosts += [] if hosts.index is None else [f"--host_index={hosts.index}"]
    per_host = case.workers // max(1, len(hosts.names))
    launcher = ["-m", "launch.run", f"--workers={per_host}", "--max_restarts=0", "--console=all", *of_hosts]
    return [sys.executable, *launcher, f"--logs_dir={folder / 'logs'}", "--", *worker]


def _facts(of_workers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of the first worker, with the most memory and the longest start of any."""
    facts = of_workers[0]
    for name in ("memory", "startup_s"):
        keys = facts[name].keys()
        facts[name] = {key: max((f[name][key] for f in of_workers), key=lambda value: value or 0) for key in keys}
    facts["warnings"] = list(dict.fromkeys(warning for f in of_workers for warning in f["warnings"]))
    return facts


def _run(argv: list[str], limit_secs: float) -> str | None:
    """Run a command; return None if it ended well, else why not. Its whole process group ends with it."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_secs)
        except subprocess.TimeoutExpired:
            return f"it was still running after {limit_secs:.0f} s, and was killed; give more with --limit_secs."
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return None
        output.seek(0)
        return _last_words(output.read(), code)


def _last_words(output: str, code: int) -> str:
    """Return the last sentence that distloop said, else the last line, else the exit code."""
    lines = [re.sub(r"^(\[rank \d+\] )+", "", line).strip() for line in output.splitlines()]
    said = [line.removeprefix("distloop: ") for line in lines if line.startswith("distloop: ")]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    return (said or errors or [line for line in lines if line] or [f"it ended with exit code {code}."])[-1]
