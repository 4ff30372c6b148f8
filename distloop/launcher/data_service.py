"""A tf.data service on this machine: its dispatcher and workers, each a process of its own. Imports no TensorFlow."""

import os
import socket
import subprocess
import sys

from distloop.errors import UsageError, check_address
from distloop.launcher import processes

_CONNECT_SECS = 10


def run(*, workers: int, port: int, host: str, dispatcher: str | None) -> int:
    """Serve until a signal ends this process, or the dispatcher dies; return an exit code (128 + n for a signal).

    `host` is the name under which training processes reach this machine. `dispatcher` is the address of one that runs
    elsewhere, to which workers are added. A worker that dies is started again; no process outlives this one.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected at least 1.")
    if not 0 <= port < 2**16:
        raise UsageError(f"port is {port}; expected 1 to 65535, or 0 for a free one.")
    if dispatcher is not None:
        _check_dispatcher(dispatcher)
    elif port:
        _check_port(port)
    names: dict[int, str] = {}  # of the running processes, by their ids
    with processes.killed_at_exit() as started:

        def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
            process = _start(*arguments)
            started.append(process)
            names[process.pid] = name
            return process

        if dispatcher is None:
            port = port or processes.free_ports(1)[0]  # known before the dispatcher serves, so that all start together
            dispatcher = f"{host}:{port}"
            start("the dispatcher", "dispatcher", str(port))
        for index in range(workers):
            start(f"worker {index}", "worker", dispatcher, host)
        for process in list(started):
            if not _serves(process):
                return process.wait()
        print(f"tf.data service with {workers} workers: train with --data_service={dispatcher}", flush=True)
        while True:
            pid, how, code = _next_end()
            name = names.pop(pid, None)
            if name == "the dispatcher":
                print(f"distloop: the dispatcher {how}; its workers are stopped.", file=sys.stderr)
                return code
            if name is not None:
                print(f"distloop: {name} {how}; it is started again.", file=sys.stderr, flush=True)
                start(name, "worker", dispatcher, host)


def _check_port(port: int) -> None:
    # TensorFlow shares a port that another dispatcher has, so that clients would reach either.
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that a dead dispatcher had is free
        try:
            one.bind(("", port))
        except OSError as error:
            raise UsageError(f"port is {port}, which cannot be had ({error.strerror}); give another one.") from error


def _check_dispatcher(address: str) -> None:
    check_address(address, "dispatcher")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECS).close()
    except OSError as error:
        raise UsageError(
            f"dispatcher is {address}, where no one listens ({error}); start python -m launch.data_service there and "
            "give the address that it prints."
        ) from error


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distloop.data_server", *arguments]
    return processes.start(command, environment=os.environ, output=subprocess.PIPE, errors=None)


def _serves(process: subprocess.Popen[bytes]) -> bool:
    """Wait until a process serves; tell whether it does, or has ended instead and said why."""
    assert process.stdout is not None
    return bool(process.stdout.readline())


def _next_end() -> tuple[int, str, int]:
    """Wait for any child to end; return its id, how it ended, and an exit code."""
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return pid, processes.how(code), processes.exit_code(code)
