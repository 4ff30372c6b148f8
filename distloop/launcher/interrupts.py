"""Signals to the supervisor, as something that can be waited for together with all else."""

import os
import signal
import socket
from types import FrameType
from typing import final

_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@final
class Interrupts:
    """Take the signals by which people and schedulers ask for an end, while it is entered.

    `first` is the first of them, None before. `insists`: a person has pressed Ctrl-C once more; a scheduler may repeat
    its signal within milliseconds, as Slurm does. `fileno()` becomes readable with each.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.insists = False

    def __enter__(self) -> "Interrupts":
        self._receiver, self._sender = socket.socketpair()
        for end in (self._receiver, self._sender):
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in _HEARD if not (number == signal.SIGHUP and nohup)]
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._receiver.close()
        self._sender.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.insists |= self.first is not None and number == signal.SIGINT
        self.first = self.first or number

    def fileno(self) -> int:
        """Return what `select` finds readable after a signal, until `clear`."""
        return self._receiver.fileno()

    def clear(self) -> None:
        """Wait for the next signal again."""
        try:
            while os.read(self._receiver.fileno(), 64):
                pass
        except BlockingIOError:
            pass
