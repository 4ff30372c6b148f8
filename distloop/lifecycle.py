"""Where this process is, who asked it to stop, and how it ended: signals, exit codes, the record of an error.

TensorFlow's MultiWorkerMirroredStrategy replaces SIGTERM's handler by one that goes on training, and while a compiled
call runs no Python handler runs. So the signal's number goes through a pipe to a thread, which sets a variable that the
compiled steps read.
"""

import contextlib
import itertools
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, final

import keras
import tensorflow as tf
from tensorflow.python.eager import context as tf_context

from distloop import storage, workdir
from distloop.cluster import Cluster
from distloop.config import NotFiniteError, PeerLostError, Stopped, UsageError
from distloop.storage import Path

# What TensorFlow says on a worker when another one has gone; measured by killing, stopping and failing workers.
_SIGNS_OF_A_LOST_PEER = (
    "Collective ops is aborted by",
    "CoordinationServiceError",
    "coordination service",
    "heartbeat",
    "failed to connect to all addresses",
    "Connection reset by peer",
    "Connection refused",
    "Socket closed",
    "different incarnation",
    "Barrier failed",
)

PATIENCE_SECS = 3600  # how long a worker waits at the end for the others, of which one may write a large checkpoint
_ends = itertools.count()  # a barrier serves once


@final
class Lifecycle:
    """Follow one run of this process: `phase` and `step` say where it is."""

    def __init__(self, workers: Cluster) -> None:
        self.workers = workers
        self.phase = "setup"
        self.step = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[tf.Variable]:
        """Take SIGTERM and SIGINT as requests to stop; yield a float32 scalar that becomes 1 with the first.

        Use it once the strategy stands, outside of its scope. A second SIGINT ends the process at once, as either
        signal does while no worker can be in its first step: there is nothing to save. Only Python's main thread can
        take signals; in another one nothing changes.
        """
        with tf.device("CPU:0"):
            stop = tf.Variable(tf.constant(0.0), trainable=False)
        if threading.current_thread() is not threading.main_thread():
            yield stop
            return
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        previous = {number: signal.signal(number, _leave_to_thread) for number in (signal.SIGTERM, signal.SIGINT)}
        thread = threading.Thread(target=self._hear, args=(receiver, stop), daemon=True)
        thread.start()
        try:
            yield stop
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            sender.close()  # ends the thread
            thread.join()
            receiver.close()

    def _hear(self, receiver: socket.socket, stop: tf.Variable) -> None:
        interrupts = 0
        while received := receiver.recv(1):
            number = received[0]  # of any signal that has a Python handler
            interrupts += number == signal.SIGINT
            before_steps = self.phase == "setup" or (self.phase == "compile" and self.workers.num_workers == 1)
            if number not in (signal.SIGTERM, signal.SIGINT) or (self.phase == "end" and interrupts < 2):
                continue
            if interrupts > 1 or before_steps:
                _say(f"stopped at once, in {self.phase}; the same command goes on from the last checkpoint.")
                os._exit(128 + number)
            stop.assign(1.0)
            _say(f"{signal.Signals(number).name}: all workers stop after this step, with a checkpoint.")

    def in_phase(self, name: str, action: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return `action` such that `phase` is `name` while it acts."""

        def act(progress: Any) -> None:
            before, self.phase = self.phase, name
            action(progress)  # an error leaves the phase as it is, for its record
            self.phase = before

        return act

    @contextlib.contextmanager
    def recording_errors(self, folder: Path) -> Iterator[None]:
        """Write what ends the block with an error to `folder/errors/`, marked if it only follows from another worker's.

        Raises PeerLostError in its place if so. A stop is no error, nor is what the user can mend before training.
        """
        try:
            yield
        except Exception as error:
            mendable = isinstance(error, UsageError) and self.phase in ("setup", "compile")
            if isinstance(error, Stopped) or mendable:
                raise
            collateral = self.workers.num_workers > 1 and is_collateral(error)
            phase = self.phase
            self._write_error(folder, error, collateral=collateral)
            if isinstance(error, NotFiniteError):  # raised by all workers; the chief may still be writing
                with contextlib.suppress(tf.errors.OpError):
                    self.leave_together()
            elif not collateral:
                self._tell_the_others(error)
            else:
                raise PeerLostError(
                    f"worker {self.workers.index} stopped in {phase} after step {self.step}, because another worker "
                    f"has gone: look for its own error in {folder / 'errors'}. The same command goes on from the last "
                    "checkpoint."
                ) from error
            raise

    def _write_error(self, folder: Path, error: Exception, *, collateral: bool) -> None:
        path = folder / "errors" / f"{time.time_ns()}_worker{self.workers.index}.json"
        record = {
            "worker": self.workers.index,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.phase,
            "step": self.step,
            "collateral": collateral,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "time": time.time(),
            "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__},
        }
        try:
            with storage.os_errors():
                path.parent.mkdir(parents=True, exist_ok=True)
            workdir.write_json(path, record)
        except OSError as failure:  # the disk is full, perhaps, which may be the error itself
            _say(f"the error could not be recorded in {path} ({failure}).")

    def _tell_the_others(self, error: Exception) -> None:
        """Make the other workers fail now, with this error's text; else they wait until this process has ended."""
        if self.workers.num_workers > 1:
            text = f"CoordinationServiceError: worker {self.workers.index} failed: {type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the service may have gone, too
                service: Any = tf_context.context()
                service.report_error_to_cluster(tf.errors.INTERNAL, text)

    def leave_together(self) -> None:
        """Wait for all workers: one that ends early makes the others fail (tensorflow#58434)."""
        self.phase = "end"
        if self.workers.num_workers > 1:
            # TensorFlow's error names the workers that do not come.
            service: Any = tf_context.context()
            service.wait_at_barrier(f"distloop/end/{next(_ends)}", PATIENCE_SECS * 1000)


def is_collateral(error: BaseException | None) -> bool:
    """Tell whether an error of TensorFlow says no more than that another worker has gone."""
    while error is not None and not isinstance(error, OSError):  # which is of storage, whatever its words
        if isinstance(error, tf.errors.OpError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PEER):
            return True
        error = error.__cause__
    return False


def _say(sentence: str) -> None:
    print(f"distloop: {sentence}", file=sys.stderr, flush=True)


def _leave_to_thread(number: int, frame: object) -> None:
    """Do nothing: the signal's number is in the pipe already."""
