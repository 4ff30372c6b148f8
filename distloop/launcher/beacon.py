"""What a worker tells its supervisor all the time, and whether it is asked to stop: 56 bytes of shared memory.

The memory has no name, so nothing is left of it when both are gone. A worker inherits it as a file descriptor, whose
number is in the variable DISTLOOP_BEACON.
"""

import mmap
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, final

VARIABLE = "DISTLOOP_BEACON"
# What a worker can be doing. `import` is said of one that has not said anything yet; `input` is a step that waits for
# its batch, `action` what the user has added to the loop.
PHASES = ("import", "setup", "compile", "step", "input", "eval", "save", "action", "end")

# Offsets; each value is an aligned word, which is never read torn.
_CHANGED, _STEP, _PHASE, _PROGRESS, _WAITS, _STOP, _PID = range(0, 56, 8)
_BYTES = 56
_NAME = "distloop_beacon"  # in /proc
_MESSAGE, _LONGEST_MESSAGE = 4096, 1 << 20  # behind the words: offset, bytes


class Sighting(NamedTuple):
    """Hold what a worker said last. `changed` is the time (CLOCK_MONOTONIC, seconds) at which it last was news."""

    phase: str
    step: int  # the last that is complete
    changed: float = 0.0
    progress: int = 0  # any number that moves with what the worker does within the phase, such as an evaluation's steps
    waits: bool = False  # it has done its part, and waits for other workers: what holds them all up is elsewhere


@final
class Beacon:
    """The memory that one worker and its supervisor share. One writes phase and step, the other the request to stop."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _BYTES)

    @staticmethod
    def create() -> "Beacon":
        """Make a new one; the supervisor does, for each attempt of each worker."""
        descriptor = os.memfd_create(_NAME)
        os.ftruncate(descriptor, _BYTES)
        beacon = Beacon(descriptor)
        beacon.tell("import", 0)
        return beacon

    @staticmethod
    def inherited(environment: Mapping[str, str]) -> "Beacon | None":
        """Return the one that this process was started with, if it was started by a supervisor.

        A program in between may have kept the descriptor to itself; then its number can be that of another file.
        """
        number = environment.get(VARIABLE, "")
        try:
            if _NAME not in Path(f"/proc/self/fd/{number}").readlink().name:
                return None
        except OSError:
            return None
        beacon = Beacon(int(number))
        beacon._write(_PID, os.getpid())
        return beacon

    def tell(self, phase: str, step: int, *, progress: int = 0, waits: bool = False) -> None:
        """Say where this worker is. The time is that of the last change of anything of it."""
        before = self.read()
        if before != (phase, step, before.changed, progress, waits) or not before.changed:
            self._write(_PHASE, PHASES.index(phase))
            self._write(_STEP, step)
            self._write(_PROGRESS, progress)
            self._write(_WAITS, waits)
            self._write(_CHANGED, time.monotonic_ns())

    def read(self) -> Sighting:
        """Return what the worker said last."""
        return Sighting(
            phase=PHASES[self._read(_PHASE)],
            step=self._read(_STEP),
            changed=self._read(_CHANGED) / 1e9,
            progress=self._read(_PROGRESS),
            waits=bool(self._read(_WAITS)),
        )

    def ask_to_stop(self) -> None:
        """Ask the worker to stop with a checkpoint, together with all others."""
        self._write(_STOP, 1)

    @property
    def stop_asked(self) -> bool:
        """Tell whether the worker is asked to stop."""
        return self._read(_STOP) != 0

    def leave(self, message: bytes) -> None:
        """Leave a message where no full disk is in the way."""
        os.pwrite(self.descriptor, message, _MESSAGE)

    def left(self) -> bytes:
        """Return the message that the worker has left, empty if there is none."""
        return os.pread(self.descriptor, _LONGEST_MESSAGE, _MESSAGE)

    @property
    def pid(self) -> int:
        """Return the process that has inherited it, which may be a child of the one that was started; 0 if none has."""
        return self._read(_PID)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.descriptor)

    def _read(self, offset: int) -> int:
        return struct.unpack_from("=q", self._memory, offset)[0]

    def _write(self, offset: int, value: int) -> None:
        struct.pack_into("=q", self._memory, offset, value)
