"""Rehearse a fault: DISTLOOP_FAULT=step:kind makes this process fail in that training step.

`launch.run --fault` sets it for one worker; docs/launch/checks.md says what each kind does.
"""

import dataclasses
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.checkpoint_files import INDEX
from distloop.launcher.fault import VARIABLE, parse_own_fault
from distloop.task import Batch, State, Task


def with_fault(task: Task, workdir: str) -> Task:
    """Return `task` with the fault that the environment asks for, the same task if it asks for none.

    Raises UsageError if it cannot be read.
    """
    if VARIABLE not in os.environ:
        return task
    _, at, kind = parse_own_fault(os.environ[VARIABLE])

    def fail(step: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if step == at and kind == "nan":
            return np.full_like(weight, np.nan)
        if step == at:
            _FAULTS[kind](Path(workdir).absolute())
        return weight

    def train_step(state: State, batch: Batch) -> Any:
        weight = tf.numpy_function(fail, [state.step + 1, batch["weight"]], tf.float32)
        return task.train_step(state, {**batch, "weight": tf.ensure_shape(weight, batch["weight"].shape)})

    return dataclasses.replace(task, train_step=train_step)


def _kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    _hang()  # in another thread than the one that takes the signal


def _hang(*_: object) -> None:
    threading.Event().wait()


def _raise(*_: object) -> None:
    raise RuntimeError(f"{VARIABLE}={os.environ[VARIABLE]}: a rehearsal, no fault of the code.")


def _fill_disk(folder: Path) -> None:
    """Refuse what Python makes or opens for writing in `folder`; TensorFlow writes into folders that Python makes."""

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    _before_writes(folder, refuse)


def _tear_save(folder: Path) -> None:
    """Die when the next checkpoint is there but for its index."""
    _before_writes(folder, lambda path: _kill() if path.name.startswith(INDEX) else None)


def _before_writes(folder: Path, act: Callable[[Path], None]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "os.mkdir" or (event == "open" and arguments[2] & os.O_ACCMODE != os.O_RDONLY)
        if writes and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0]).absolute()
            if path.is_relative_to(folder):
                act(path)

    sys.addaudithook(hook)  # Python tells of each such operation before it does it


_FAULTS: dict[str, Callable[[Path], object]] = {
    "kill": _kill,
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": _hang,
    "raise": _raise,
    "exit0": lambda _: os._exit(0),
    "enospc": _fill_disk,
    "torn_save": _tear_save,
}
