"""Whether this host can do what is planned for it, asked before any worker starts and without TensorFlow."""

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distloop.errors import PreflightError

LEAST_BYTES = 100_000_000  # free on the disk of the workdir; a worker looks again once it knows what a checkpoint takes


def check_host(command: Sequence[str], *, gpus: Sequence[str], workdir: str | None) -> None:
    """Raise PreflightError, with this host's name, for the first thing that is not as planned.

    `gpus` are those of this host's workers, `workdir` that of the command, if it has one; it is made.
    """
    check_program(command[0])
    check_gpus(gpus)
    if workdir is not None and "://" not in workdir:
        check_workdir(Path(workdir))


def check_program(program: str) -> None:
    """Raise PreflightError unless the program can be started."""
    if shutil.which(program) is None:
        where = f"in {Path.cwd()}" if os.sep in program else "on PATH"
        raise PreflightError(
            f"{_host()}: there is no program {program} {where}; install it, or give its path on this host."
        )


def check_gpus(gpus: Sequence[str], *, devices: Path = Path("/dev")) -> None:
    """Raise PreflightError if a GPU is planned that this host does not have; of GPU-... it only needs one at all."""
    if (devices / "dxg").exists():  # Windows' subsystem for Linux has no file for each GPU
        return
    there = len(list(devices.glob("nvidia[0-9]*")))
    missing = [name for name in gpus if not there or (name.isdecimal() and int(name) >= there)]
    if missing:
        raise PreflightError(
            f"{_host()}: GPU {missing[0]} is planned (CUDA_VISIBLE_DEVICES), but this host shows {there} GPU(s) in "
            f"{devices}; give a host that has it, or change the variable (empty: train on the CPU)."
        )


def check_workdir(workdir: Path) -> None:
    """Make the folder, write to it, and raise PreflightError if that or the space that is left does not do."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PreflightError(
            f"{_host()}: workdir {workdir} cannot be written to ({error.strerror}); mount it here for writing, free "
            "some space, or give another."
        ) from error
    free = shutil.disk_usage(workdir).free
    if free < LEAST_BYTES:
        raise PreflightError(
            f"{_host()}: workdir {workdir} has {free / 1e6:.0f} MB left, less than {LEAST_BYTES / 1e6:.0f} MB; free "
            "some space, or give another."
        )


def _host() -> str:
    return f"host {socket.gethostname()}"
