"""Real processes for tests: each in its own session, on fresh ports, ended by SIGKILL at a limit."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distloop.cluster import Cluster, to_tf_config
from distloop.launcher.local import free_ports

ROOT = Path(__file__).parents[1]


def start(arguments: Sequence[str], *, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Start `python <arguments>`; the caller must `finish` it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TF_CONFIG", "FORCE_COLOR")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children at once; a worker in a collective ignores SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[str], *, limit_secs: float = 180) -> tuple[int, str, str]:
    """Wait for a process; return exit code, stdout and stderr. At the limit it is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=limit_secs)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit_secs} s\n{out[-2000:]}\n{err[-4000:]}") from None
    return process.returncode, out, err


def run(*arguments: str, limit_secs: float = 180, **environment: str) -> tuple[int, str, str]:
    """Run `python <arguments>` to its end."""
    return finish(start(arguments, **environment), limit_secs=limit_secs)


def run_workers(
    arguments: Sequence[str], *, workers: int, limit_secs: float = 180, **environment: str
) -> list[tuple[int, str, str]]:
    """Run `python <arguments>` in every worker of a fresh cluster on loopback, to their ends."""
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(workers))
    configs = [to_tf_config(Cluster(addresses, index)) for index in range(workers)]
    processes = [start(arguments, TF_CONFIG=config, **environment) for config in configs]
    try:
        return [finish(process, limit_secs=limit_secs) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)
