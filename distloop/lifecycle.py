"""Where this process is, who asked it to stop, and how it ended: the beacon, signals, the record of an error.

TensorFlow's MultiWorkerMirroredStrategy replaces SIGTERM's handler by one that goes on training, and while a compiled
call runs no Python handler runs. So the signal's number goes through a pipe to a thread, which sets a variable that the
compiled steps read.
"""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, final

import tensorflow as tf
from tensorflow.python.eager import context as tf_context

from distloop import storage, workdir
from distloop.cluster import Cluster
from distloop.errors import NotFiniteError, PeerLostError, Stopped, UsageError
from distloop.launcher import error_record
from distloop.launcher.beacon import Beacon, Sighting
from distloop.position import Position
from distloop.say import say
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
_BEACON_SECS = 0.2  # how often the supervisor gets news
_ends = itertools.count()  # a barrier serves once


@final
class Lifecycle:
    """Follow one run of this process.

    `training`, whose steps count from `first_step`, and `evaluation` say where it is within a compiled call. A process
    that `only_reads` has nothing to save, and can leave at any time.
    """

    def __init__(self, workers: Cluster, *, only_reads: bool = False) -> None:
        self.workers = workers
        self.first_step = 0
        self.training: Position | None = None
        self.evaluation: Position | None = None
        self._phase = "setup"
        self._looks = 0
        self._only_reads = only_reads
        self._stop: tf.Variable | None = None
        self._beacon: Beacon | None = None
        self._lock = threading.Lock()

    @property
    def phase(self) -> str:
        """Return what this process does: one of `beacon.PHASES`."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        # Told at once: some waits in TensorFlow let no other thread run.
        self._phase = phase
        self._tell()

    def now(self) -> Sighting:
        """Return where this process is, `step` also within a call of many. Any thread may ask, at any time."""
        phase, step, progress, waits = self.phase, self.first_step, self._looks, self.phase == "end"
        if self.training is not None:
            where = self.training.read()
            step += where.steps
            if phase == "step":
                progress, waits = where.marks, where.waits
                # The first step is compiled when it runs.
                phase = "input" if where.in_input else "step" if where.steps or where.waits else "compile"
        if phase == "eval" and self.evaluation is not None:
            where = self.evaluation.read()
            progress, waits = where.marks, where.waits
        return Sighting(phase, step, progress=progress, waits=waits)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the supervisor, if there is one, where this process is, and stop when it asks for it. Use it first."""
        self._beacon = Beacon.inherited(os.environ)
        if self._beacon is None:
            yield
            return
        self._tell()
        ended = threading.Event()
        thread = threading.Thread(target=self._follow, args=(self._beacon, ended), name="beacon", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _follow(self, beacon: Beacon, ended: threading.Event) -> None:
        heard = over = False
        while not over:
            over = ended.wait(_BEACON_SECS)
            self._tell()
            if beacon.stop_asked and not heard:
                heard = True
                self._stop_for("the supervisor", 128 + signal.SIGTERM)

    def _tell(self) -> None:
        if self._beacon is not None:
            with self._lock:  # what is older must not be told later
                now = self.now()
                self._beacon.tell(now.phase, now.step, progress=now.progress, waits=now.waits)

    @contextlib.contextmanager
    def listening(self) -> Iterator[tf.Variable]:
        """Take SIGTERM and SIGINT as requests to stop; yield a float32 scalar that becomes 1 with the first request.

        Use it once the strategy stands, outside of its scope. A second SIGINT ends the process at once, as either
        signal does while no worker can be in its first step: there is nothing to save. Only Python's main thread can
        take signals; in another one nothing changes.
        """
        with tf.device("CPU:0"):
            self._stop = tf.Variable(tf.constant(0.0), trainable=False)
        if threading.current_thread() is not threading.main_thread():
            yield self._stop
            return
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        previous = {number: signal.signal(number, _leave_to_thread) for number in (signal.SIGTERM, signal.SIGINT)}
        thread = threading.Thread(target=self._hear, args=(receiver,), daemon=True)
        thread.start()
        try:
            yield self._stop
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            sender.close()  # ends the thread
            thread.join()
            receiver.close()

    def _hear(self, receiver: socket.socket) -> None:
        interrupts = 0
        while received := receiver.recv(1):
            number = received[0]  # of any signal that has a Python handler
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                self._leave_at_once(128 + number)
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop_for(signal.Signals(number).name, 128 + number)

    def _stop_for(self, why: str, exit_code: int) -> None:
        """Make all workers stop after this step, or this one at once if there is nothing to save."""
        if self.phase == "end":
            return
        before_steps = self.phase == "setup" or (self.phase == "compile" and self.workers.num_workers == 1)
        if before_steps or self._only_reads or self._stop is None:
            self._leave_at_once(exit_code)
        self._stop.assign(1.0)
        say(f"{why}: all workers stop after this step, with a checkpoint.")

    def _leave_at_once(self, exit_code: int) -> NoReturn:
        say(f"stopped at once, in {self.phase}; the same command goes on from the last checkpoint.")
        os._exit(exit_code)

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
            if isinstance(error, Stopped):
                raise
            collateral = self.workers.num_workers > 1 and is_collateral(error)
            now = self.now()
            record = error_record.describe(error, phase=now.phase, step=now.step, collateral=collateral)
            error_record.hand_over(record)
            if isinstance(error, UsageError) and self.phase in ("setup", "compile"):
                raise
            self._write_error(folder, record)
            if isinstance(error, NotFiniteError):  # raised by all workers; the chief may still be writing
                with contextlib.suppress(tf.errors.OpError):
                    self.leave_together()
            elif not collateral:
                self._tell_the_others(error)
            else:
                raise PeerLostError(
                    f"worker {self.workers.index} stopped in {now.phase} after step {now.step}, because another worker "
                    f"has gone: look for its own error in {folder / 'errors'}. The same command goes on from the last "
                    "checkpoint."
                ) from error
            raise

    def _write_error(self, folder: Path, record: dict[str, Any]) -> None:
        path = folder / "errors" / f"{time.time_ns()}_worker{self.workers.index}.json"
        try:
            with storage.os_errors():
                path.parent.mkdir(parents=True, exist_ok=True)
            workdir.write_json(path, {"worker": self.workers.index, **record})
        except OSError as failure:  # the disk is full, perhaps, which may be the error itself
            say(f"the error could not be recorded in {path} ({failure}).")

    def _tell_the_others(self, error: Exception) -> None:
        """Make the other workers fail now, with this error's text; else they wait until this process has ended."""
        if self.workers.num_workers > 1:
            # Each repeats it, so it is short.
            text = f"CoordinationServiceError: worker {self.workers.index} failed: {error_record.summary(error)}"
            with contextlib.suppress(Exception):  # the service may have gone, too
                service: Any = tf_context.context()
                service.report_error_to_cluster(tf.errors.INTERNAL, text)

    def wait_for_news(self, seconds: float) -> None:
        """Wait for what may take any time, a checkpoint of another process: that nothing comes is no hang."""
        self._looks += 1
        self.phase = "input"
        time.sleep(seconds)

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


def _leave_to_thread(number: int, frame: object) -> None:
    """Do nothing: the signal's number is in the pipe already."""
