"""One worker of an attempt, as its supervisor sees it: process, beacon and log, and what can be said of its failure."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distloop.errors import PeerLostError, PreflightError
from distloop.launcher import error_record, processes, report
from distloop.launcher.beacon import VARIABLE as BEACON
from distloop.launcher.beacon import Beacon
from distloop.launcher.logs import Console, Log, open_terminal, tail
from distloop.launcher.plan import Worker
from distloop.launcher.report import Failure


@dataclass
class Member:
    """Hold one worker. `descriptor` is readable once the process has ended, `ended` is when it did (`time.time`)."""

    rank: int
    process: subprocess.Popen[bytes]
    descriptor: int
    beacon: Beacon
    log: Log
    error_file: Path
    begin: int | None = None  # the step after which it began
    ended: float | None = None

    @property
    def pid(self) -> int:
        """Return the process that trains, which may be a child of the one that was started: of a script, a profiler."""
        pid = self.beacon.pid
        with contextlib.suppress(OSError):
            return pid if pid and os.getsid(pid) == self.process.pid else self.process.pid
        return self.process.pid

    @property
    def attached(self) -> bool:
        """Tell whether it is a process of distloop that has come so far as to tell where it is."""
        return self.beacon.read().phase != "import"

    @property
    def left_early(self) -> bool:
        """Tell whether it has ended well while it should have been at work. Other programs may end when they like."""
        return self.process.returncode == 0 and self.attached and self.beacon.read().phase != "end"

    def close(self) -> None:
        """Give back what is held; the process must have ended."""
        self.log.close()
        self.beacon.close()
        os.close(self.descriptor)


def start(
    worker: Worker,
    added: Mapping[str, str],
    log_path: Path,
    console: Console | None,
    *,
    prefixed: bool,
    terminal: bool,
) -> Member:
    """Start a worker with the environment of this process, changed by the plan and by `added`; see `Log`."""
    beacon = Beacon.create()
    reader, writer = open_terminal() if terminal else os.pipe()
    error_file = log_path.with_suffix(".error.json")
    log = Log(log_path, reader, console, rank=worker.rank if prefixed else None, terminal=terminal)
    settings = {"PYTHONUNBUFFERED": "1", **os.environ, **worker.environment, **added}  # a killed worker cannot flush
    settings |= {BEACON: str(beacon.descriptor), error_record.VARIABLE: str(error_file.absolute())}
    environment = {name: value for name, value in settings.items() if value is not None}
    try:
        process = processes.start(
            worker.command, environment=environment, output=writer, descriptors=[beacon.descriptor]
        )
    except OSError as error:
        log.close()
        raise PreflightError(
            f"host {socket.gethostname()}: {worker.command[0]} cannot be started ({error.strerror}); give a program "
            "that this host can run."
        ) from error
    finally:
        os.close(writer)
    return Member(worker.rank, process, os.pidfd_open(process.pid), beacon, log, error_file)


def known_failure(member: Member, *, oom_kills: int) -> Failure | None:
    """Return how a worker failed, if it has recorded an error or ended badly. `oom_kills` are those of the attempt."""
    record = report.read_record(member.error_file, member.beacon.left())
    code = member.process.returncode
    if record is not None:
        unexpected = record["exit_code"] == 1
        return Failure(
            rank=member.rank,
            host=record["host"],
            phase=record["phase"],
            step=record["step"],
            what=record["summary"] if unexpected else record["message"],
            log=str(member.log.path),
            when=record["time"],
            code=processes.exit_code(code) if code else record["exit_code"],  # a script around it may end with 0
            error=record["summary"],
            details=record["traceback"] if unexpected else "",
            collateral=record["collateral"],
        )
    if member.ended is None or (code == 0 and not member.left_early):
        return None
    if code == 0:
        return failure(member, "ended with exit code 0 before its work was done", 1)
    how = processes.how(code)
    if code == -signal.SIGKILL and oom_kills:
        how += ", it seems by the kernel because memory was used up"
    return failure(member, how, processes.exit_code(code))


def failure(member: Member, what: str, code: int, *, details: str | None = None) -> Failure:
    """Return a failure that the worker has not recorded itself; `details` are the end of its log by default."""
    seen = member.beacon.read()
    return Failure(
        rank=member.rank,
        host=socket.gethostname(),
        phase=seen.phase,
        step=seen.step if member.attached else None,
        what=what,
        log=str(member.log.path),
        when=member.ended or time.time(),
        code=code,
        error=what if code < 124 else None,
        details=report.last_lines(tail(member.log.path)) if details is None else details,
        collateral=code == PeerLostError.exit_code,
    )


def stacks_of(members: list[Member], begins: list[int]) -> list[list[str]]:
    """Return for each worker the lines of its log from the byte in `begins` on."""
    found = []
    for member, begin in zip(members, begins, strict=True):
        with member.log.path.open("rb") as file:
            file.seek(begin)
            found.append(file.read().decode(errors="replace").splitlines())
    return found


def oom_kills() -> int:
    """Return how many processes the kernel of this machine has killed for want of memory."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
