"""Several worker processes on this machine, each with its TF_CONFIG and a fresh port. Imports no TensorFlow."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from distloop.cluster import Cluster, to_tf_config
from distloop.config import NotFiniteError, PeerLostError, Stopped, UsageError

GRACE_SECS = 30  # for a step, a checkpoint and the way out
_ALIKE = (Stopped.exit_code, NotFiniteError.exit_code)  # all workers end so, once each is done
CAUSE_SECS = 10  # for a worker to end by its own error, when another one already has because of it


def run(train_arguments: Sequence[str], *, workers: int) -> int:
    """Train in `workers` processes; return 0, or the exit code of the first that failed (128 + n for a signal).

    Worker 0, the chief, has this terminal; lines of the others come with a prefix. The first failure ends all, with
    SIGKILL because a worker that waits in a collective cannot hear anything else; none outlives this process. SIGTERM
    and SIGINT are passed on once, and all workers stop together (exit code 143); what is still there after
    `GRACE_SECS`, or at a second signal, is killed.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected at least 1.")
    command = [sys.executable, "-m", "distloop", *train_arguments]
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(workers))
    with _killed_at_exit() as processes:
        for index in range(workers):
            environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
            if workers > 1:
                environment["TF_CONFIG"] = to_tf_config(Cluster(addresses, index))
            processes.append(_start(command, environment, is_chief=index == 0))
        printers = [
            threading.Thread(target=_print_lines, args=(process.stdout, f"[worker {index}] "), daemon=True)
            for index, process in enumerate(processes)
            if process.stdout is not None
        ]
        for printer in printers:
            printer.start()
        code = _wait(processes)
    for printer in printers:
        printer.join(timeout=1)  # what a killed worker still had in its pipe
    return code


def _start(command: Sequence[str], environment: dict[str, str], *, is_chief: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if is_chief else subprocess.PIPE,
        stderr=None if is_chief else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return when all have ended with 0 or all alike (stopped, diverged), or at the first that failed for itself."""
    running = {process.pid: process for process in processes}
    code = 0
    while running:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # in the order of their ends
        assert ended is not None  # only WNOHANG gives None
        process = running.pop(ended.si_pid, None)
        if process is None:  # a child that this process inherited, as process 1 of a container does
            os.waitpid(ended.si_pid, 0)
            continue
        process.wait()
        if code in _ALIKE:
            continue  # what the others end with only follows from that
        if process.returncode == PeerLostError.exit_code:
            process = _cause(running.values()) or process
        code = process.returncode
        if code in _ALIKE:
            signal.alarm(GRACE_SECS)
        elif code != 0:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            print(f"distloop: worker {processes.index(process)} {how}; the others are stopped.", file=sys.stderr)
            return code if code > 0 else 128 - code
    return code


def _cause(running: Iterable[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """Return the worker that took another one with it, once it has recorded its own error and ended."""
    limit = time.monotonic() + CAUSE_SECS
    while time.monotonic() < limit:
        for process in running:
            if process.poll() not in (None, 0, PeerLostError.exit_code):
                return process
        time.sleep(0.05)
    return None


@contextlib.contextmanager
def _killed_at_exit() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Kill the processes put into the list when the block ends; tell them of a SIGINT or SIGTERM to this process."""
    processes: list[subprocess.Popen[bytes]] = []
    told = False

    def stop(number: int, _: object) -> None:
        nonlocal told
        if told or number == signal.SIGALRM:
            sys.exit(128 + (signal.SIGKILL if number == signal.SIGALRM else number))
        told = True
        signal.alarm(GRACE_SECS)
        for process in processes:
            if process.returncode is None:  # no poll here: it would take an exit from under `_wait`
                os.kill(process.pid, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield processes
    finally:
        signal.alarm(0)
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """End this process when its parent ends; for `preexec_fn`."""
    pr_set_pdeathsig = 1  # prctl(2), Linux; without it a worker outlives a launcher that gets SIGKILL
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _print_lines(stream: IO[bytes], prefix: str) -> None:
    for line in stream:
        sys.stdout.write(prefix + line.decode(errors="replace"))
        sys.stdout.flush()


def free_ports(count: int) -> list[int]:
    """Return ports that no one listens on. All are held until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
