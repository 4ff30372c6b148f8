"""Launches of cases in fresh processes: the facts and windows that they leave, or the sentence they ended with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.results import Launch
from benchmarks.timing import Timing
from distloop import workdir
from distloop.launcher import processes
from distloop.storage import as_path

_FILES_SECS = 60.0
_OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Hosts:
    """Say which hosts take part: the same command runs on each of them. No `names` is this host alone."""

    names: Sequence[str] = ()
    index: int = 0


class Failed(NamedTuple):
    """Say in a sentence why a launch has ended without numbers; with 64, the user can mend it."""

    error: str
    exit_code: int


def launch(case: Case, timing: Timing, hosts: Hosts, folder: Path, *, limit_secs: float) -> Launch | Failed:
    """Measure a case once; the workers leave their numbers in `folder`, which all hosts share.

    Every host calls it and gets the same: the first tells the others how it has ended. No process is left after
    `limit_secs`, and of the measured run nothing.
    """
    if hosts.index == 0:  # the others begin to measure only once this host takes part
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distloop_bench_") as logs:
        failed = _run(command(case, timing, hosts, folder, Path(logs)), limit_secs)
    if hosts.index == 0:
        found = failed or _read(case, folder)
        workdir.write_json(as_path(folder) / _OUTCOME, found if isinstance(found, Failed) else None)
        shutil.rmtree(folder / "run", ignore_errors=True)
        return found
    told = _wait_for([folder / _OUTCOME])
    outcome = json.loads((folder / _OUTCOME).read_text()) if told else ["the first host says nothing.", 1]
    return Failed(*outcome) if outcome else _read(case, folder)


def _read(case: Case, folder: Path) -> Launch | Failed:
    files = [folder / f"rank_{rank}.json" for rank in range(case.workers)]
    if not _wait_for(files):
        return Failed("the workers of another host have left no numbers in the folder of --output.", 1)
    found = [json.loads(file.read_text()) for file in files]
    windows = [{"rank": rank, **window} for rank, worker in enumerate(found) for window in worker["windows"]]
    return Launch(records.new_id(), _facts([worker["facts"] for worker in found]), windows)


def _wait_for(files: Sequence[Path]) -> bool:
    """Return whether the files are there in time; another host may be later than this one."""
    limit = time.monotonic() + _FILES_SECS
    while not all(file.is_file() for file in files):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def command(case: Case, timing: Timing, hosts: Hosts, folder: Path, logs: Path) -> list[str]:
    """Return the command that measures a case on this host, its workers' numbers going to `folder`."""
    request = json.dumps({"case": case.to_dict(), "timing": asdict(timing), "folder": str(folder)})
    worker = [sys.executable, "-m", "benchmarks.worker", request]
    if case.workers == 1:
        return worker
    of_hosts = [f"--hosts={','.join(hosts.names)}", f"--host_index={hosts.index}"] if hosts.names else []
    per_host = case.workers // max(1, len(hosts.names))
    launcher = ["-m", "launch.run", f"--workers={per_host}", "--max_restarts=0", "--console=all", *of_hosts]
    return [sys.executable, *launcher, f"--logs_dir={logs}", "--", *worker]


def _facts(of_workers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of the first worker, with the most memory and the longest start of any."""
    facts = of_workers[0]
    for name in ("memory", "startup_s"):
        keys = facts[name].keys()
        facts[name] = {key: max((f[name][key] for f in of_workers), key=lambda value: value or 0) for key in keys}
    facts["warnings"] = list(dict.fromkeys(warning for f in of_workers for warning in f["warnings"]))
    return facts


def _run(argv: list[str], limit_secs: float) -> Failed | None:
    """Run a command; return None if it ended well. Its whole process group ends with it."""
    with tempfile.TemporaryFile("w+") as output:
        process = processes.start(argv, environment=os.environ, output=output.fileno())
        try:
            code = process.wait(limit_secs)
        except subprocess.TimeoutExpired:
            return Failed(f"still running after {limit_secs:.0f} s, and killed; give more with --limit_secs.", -9)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return None
        output.seek(0)
        return Failed(_last_words(output.read(), code), code)


def _last_words(output: str, code: int) -> str:
    """Return what a worker said of its end, else the last line that looks like an error, else the exit code.

    Of several workers the first counts: the others end because of it, and the launcher has the last word.
    """
    lines = [re.fullmatch(r"(?:\[rank (\d+)\] )*(.*)", line.strip()) for line in output.splitlines()]
    told = [(match[1], match[2].removeprefix("distloop: ")) for match in lines if match and "distloop: " in match[2]]
    of_workers = [text for rank, text in told if rank is not None]
    if of_workers or told:
        return (of_workers or [told[-1][1]])[0]
    texts = [match[2] for match in lines if match and match[2]]
    errors = [text for text in texts if re.match(r"[\w.]*(Error|Exception)\b", text)]
    return (errors or texts or [f"it ended with exit code {code}."])[-1]
