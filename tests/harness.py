"""Real processes for tests: each in its own session, on fresh ports, ended by SIGKILL at a limit."""

import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

from distloop.cluster import Cluster, to_tf_config
from distloop.launcher.processes import free_ports
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]


@final
class Process:
    """A child process, with what it writes in files."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, environment: dict[str, str], fresh: bool) -> None:
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115 (open for its life)
        out, err = self._files
        if fresh or arguments[0] not in ("-m", "-c"):
            self._popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            self.pid = self._popen.pid
        else:
            self.pid = _zygote().fork(arguments, cwd=cwd, environment=environment, out=out, err=err)
        self._descriptor = os.pidfd_open(self.pid)

    def wait(self, timeout: float) -> int:
        """Return its exit code, -n if signal n ended it. Raises TimeoutError."""
        if self.returncode is None:
            ended, _, _ = select.select([self._descriptor], [], [], timeout)
            if not ended:
                raise TimeoutError
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._descriptor)
        return self.returncode

    def fileno(self) -> int:
        """Return what `select` finds readable once the process has ended."""
        return self._descriptor

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def output(self) -> tuple[str, str]:
        """Return what it has written so far to stdout and to stderr."""
        # Opened anew: the process writes where its own file, of the same offset, stands.
        out, err = [Path(f"/proc/self/fd/{file.fileno()}").read_text(errors="replace") for file in self._files]
        return out, err


@functools.cache
def _zygote() -> Zygote:
    return Zygote(ROOT)


def start(arguments: Sequence[str], *, cwd: Path = ROOT, fresh: bool = False, **environment: str) -> Process:
    """Start `python <arguments>`; the caller must `finish` or `kill` it.

    It is forked from a process that has done the imports, to save their seconds; a `fresh` one starts from nothing, for
    tests of what is imported, of what TensorFlow writes when it loads, and of commands that start processes themselves.
    """
    return Process(arguments, cwd=cwd, environment={**environment_of_tests(), **environment}, fresh=fresh)


def environment_of_tests() -> dict[str, str]:
    """Return the environment in which processes start, without what would tell them that they are in a test."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TF_CONFIG", "FORCE_COLOR")}
    temp = {"TMPDIR": os.environ["DISTLOOP_TEST_TEMP"]} if "DISTLOOP_TEST_TEMP" in os.environ else {}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"  # whose python a command in a page means
    return {**environment, "PATH": path, "PYTHONPATH": str(ROOT), **temp}


def kill(process: Process) -> None:
    """End a process and its children at once; a worker in a collective ignores SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        os.kill(process.pid, signal.SIGKILL)  # one that was forked just now has no group of its own yet
        process.wait(60)


def until(condition: Callable[[], object], *processes: Process, limit_secs: float = 60, every_secs: float = 0.01):
    """Wait until `condition()`. Fails with what `processes` have written at the limit, or when one has ended."""
    limit = time.monotonic() + limit_secs
    while True:
        ended = [process.pid for process in processes if process.poll() is not None]  # what it did last counts
        late = time.monotonic() > limit
        if condition():
            return
        said = "".join(f"\nprocess {process.pid}, {process.returncode}: {process.output()}" for process in processes)
        assert not ended, f"ended too early: {ended}{said}"
        assert not late, f"did not come in {limit_secs} s{said}"
        time.sleep(every_secs)


def read_terminal(descriptor: int, *, limit_secs: float = 60) -> bytes:
    """Return what is written to a terminal, until nobody has it open any more."""
    shown, limit = b"", time.monotonic() + limit_secs
    while select.select([descriptor], [], [], max(limit - time.monotonic(), 0))[0]:
        try:
            shown += os.read(descriptor, 65536)
        except OSError:  # which is how a terminal ends
            return shown
    raise AssertionError(f"not closed after {limit_secs} s: {shown[-2000:]}")


def finish(process: Process, *, limit_secs: float = 180) -> tuple[int, str, str]:
    """Wait for a process; return exit code, stdout and stderr. At the limit it is killed and the test fails."""
    try:
        code = process.wait(limit_secs)
    except TimeoutError:
        kill(process)
        out, err = process.output()
        raise AssertionError(f"still running after {limit_secs} s\n{out[-2000:]}\n{err[-4000:]}") from None
    return code, *process.output()


def run(
    *arguments: str, cwd: Path = ROOT, limit_secs: float = 180, fresh: bool = False, **environment: str
) -> tuple[int, str, str]:
    """Run `python <arguments>` to its end."""
    return finish(start(arguments, cwd=cwd, fresh=fresh, **environment), limit_secs=limit_secs)


def start_workers(arguments: Sequence[str], *, workers: int, fresh: bool = False, **environment: str) -> list[Process]:
    """Start `python <arguments>` in every worker of a fresh cluster on loopback; one worker needs no cluster."""
    if workers == 1:
        return [start(arguments, fresh=fresh, **environment)]
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(workers))
    configs = [to_tf_config(Cluster(addresses, index)) for index in range(workers)]
    return [start(arguments, fresh=fresh, TF_CONFIG=config, **environment) for config in configs]


def supervised(*arguments: str, workers: int, flags: Sequence[str] = ()) -> list[str]:
    """Return the arguments that run `python <arguments>` in several workers under a supervisor with these `flags`."""
    return ["-m", "launch.run", f"--workers={workers}", *flags, "--", sys.executable, *arguments]


def run_workers(
    arguments: Sequence[str], *, workers: int, limit_secs: float = 180, **environment: str
) -> list[tuple[int, str, str]]:
    """Run `python <arguments>` in every worker of a fresh cluster on loopback, to their ends."""
    processes = start_workers(arguments, workers=workers, **environment)
    try:
        return [finish(process, limit_secs=limit_secs) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)
