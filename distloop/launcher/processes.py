"""Processes that never outlive this one: how they are started, and how all of them are ended. Linux."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
KILL_SECS = 10  # for a killed process to be gone; one in an uninterruptible system call is not


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: int,
    errors: int | None = subprocess.STDOUT,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process as the leader of a session of its own; `output` and `errors` are as for `subprocess`.

    The kernel kills it when this process ends, however that happens; so call this from the main thread, whose end
    counts as that of the process. `descriptors` stay open in it.
    """
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        pass_fds=descriptors,
        start_new_session=True,
        preexec_fn=_killed_with(os.getpid()),
    )


def _killed_with(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended between the fork and here
            os._exit(128 + signal.SIGKILL)

    return ask_kernel


def adopt_orphans() -> None:
    """Make this process the parent of what its children leave behind, so that `kill_all` finds it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_all(processes: Iterable[subprocess.Popen[bytes]]) -> list[int]:
    """Kill the processes' groups and all that has come from them; return the pids that could not be ended.

    Needs `adopt_orphans` for what has left its group, and for the group of a process that has ended.
    """
    for process in processes:
        if process.returncode is None:  # else the number may be another group's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    limit = time.monotonic() + KILL_SECS
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.poll()
        _reap()
        if time.monotonic() > limit:
            return children
        time.sleep(0.005)
    for process in processes:
        process.poll()
    return []


def _children() -> list[int]:
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped by a signal, such as SIGSTOP."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def how(code: int) -> str:
    """Say how a process ended, from its return code, -n for signal n."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def exit_code(code: int) -> int:
    """Return what a shell would say of a return code: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def killed_at_exit() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Kill the processes put into the list when the block ends, also by SIGINT or SIGTERM to this process."""
    processes: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield processes
    finally:
        kill_all(processes)
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_ports(count: int) -> list[int]:
    """Return ports that no one listens on. All are held until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
