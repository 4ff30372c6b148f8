"""What workers write: every byte to a file of its own, and whole lines to the console."""

import fcntl
import os
import pty
import re
import select
import socket
import struct
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import final

from distloop.errors import PreflightError
from distloop.say import close, say

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16  # on the console; a longer one is shown in parts
_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)  # of ANSI: cyan, yellow, magenta, green, blue, and brighter
_TAIL_BYTES = 1 << 15
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # ANSI: colours, and moves of the cursor


@final
class Console:
    """Print lines of workers, each whole, with the rank before it, coloured on a terminal unless NO_COLOR is set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._coloured = sys.stdout.isatty() and not environment.get("NO_COLOR")
        self._open = True

    def line(self, text: str, *, rank: int | None) -> None:
        """Print a line; `rank` None has no prefix."""
        prefix = "" if rank is None else f"[rank {rank}] "
        if prefix and self._coloured:
            prefix = f"\x1b[{_COLOURS[(rank or 0) % len(_COLOURS)]}m{prefix}\x1b[0m"
        self.write(f"{prefix}{text}\n".encode(errors="replace"))

    def write(self, data: bytes) -> None:
        """Print bytes as they are."""
        if self._open:
            try:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            except OSError:  # the run goes on, and has its logs
                self._open = False
                close(sys.stdout)


@final
class Lines:
    """Cut a stream of bytes into the lines that a terminal would show at last: what a carriage return left over."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are whole now."""
        *whole, rest = (self._rest + data).split(b"\n")
        # Of a progress bar, which may never end its line, only the newest state matters.
        rest = rest[max(0, rest.rstrip(b"\r").rfind(b"\r")) :]
        complete = len(rest) // _LONGEST_LINE * _LONGEST_LINE
        self._rest = rest[complete:]
        return [part for line in (*whole, *([rest[:complete]] if complete else [])) for part in _visible(line)]

    def end(self) -> list[str]:
        """Return the line that was never ended, if there is one."""
        rest, self._rest = self._rest, b""
        return _visible(rest) if rest else []


def _visible(line: bytes) -> list[str]:
    line = line.rstrip(b"\r").rpartition(b"\r")[2]
    begins = range(0, max(1, len(line)), _LONGEST_LINE)
    return [line[begin : begin + _LONGEST_LINE].decode(errors="replace") for begin in begins]


@final
class Log:
    """The output of one worker in one attempt, read from `descriptor`; lines go to `console`, if it is given.

    With `terminal` the worker has one for itself alone (`open_terminal`) and may move in it, as progress bars do: all
    bytes go to the console, and the log gets the lines that stay.
    """

    def __init__(
        self, path: Path, descriptor: int, console: Console | None, *, rank: int | None, terminal: bool = False
    ) -> None:
        self.path = path
        self.descriptor = descriptor
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise PreflightError(
                f"host {socket.gethostname()}: the log {path} cannot be written ({error.strerror}); make its folder "
                "writable, free some space, or give another with --logs_dir."
            ) from error
        self._full = False
        self._lines, self._console, self._rank, self._terminal = Lines(), console, rank, terminal
        os.set_blocking(descriptor, False)

    def pump(self) -> bool:
        """Take what there is to read now; return False once all has been read."""
        try:
            data = os.read(self.descriptor, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # a terminal whose other side is closed
            data = b""
        if self._terminal:
            if self._console is not None:
                self._console.write(data)
        else:
            self._keep(data)
        self._show(self._lines.feed(data))
        return bool(data)

    def hide(self) -> None:
        """Show no more of it than there is now: what follows, such as stacks, is for the file."""
        self.pump()
        if self._terminal and self._console is not None:
            self._console.write(b"\x1b[0m\x1b[?25h")  # a progress bar hides the cursor
        self._console = None

    def close(self) -> None:
        """Take the rest and end."""
        while select.select([self.descriptor], [], [], 0)[0] and self.pump():
            pass
        self._show(self._lines.end())
        self._file.close()
        os.close(self.descriptor)

    def _show(self, lines: list[str]) -> None:
        for line in lines:
            if self._terminal:
                self._keep(_CONTROL.sub("", line).encode() + b"\n")
            elif self._console is not None:
                self._console.line(line, rank=self._rank)

    def _keep(self, data: bytes) -> None:
        try:
            while data:  # as a disk fills up, a part is written
                data = data[self._file.write(data) :]
        except OSError as error:
            if not self._full:
                say(f"{self.path} lacks lines from here on ({error.strerror}); the run goes on.")
            self._full = True


def open_terminal() -> tuple[int, int]:
    """Return the two ends of a terminal of the size of this one; what is written to the second is read from the first.

    A pipe would keep a worker from showing its progress bar.
    """
    reader, writer = pty.openpty()
    modes = termios.tcgetattr(writer)
    modes[1] &= ~termios.OPOST  # our own terminal makes carriage returns of line feeds
    termios.tcsetattr(writer, termios.TCSANOW, modes)
    columns, lines = os.get_terminal_size(sys.stdout.fileno())
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return reader, writer


def next_attempt(folder: Path) -> int:
    """Return the number after that of the last attempt of which there is something in `folder`."""
    found = (re.match(r"attempt_(\d+)\.", path.name) for path in folder.glob("attempt_*"))
    return max((int(match[1]) for match in found if match), default=-1) + 1


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last lines of a log, as a terminal would have them."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        data = file.read()
    splitter = Lines()
    return [line for line in splitter.feed(data) + splitter.end() if line.strip()][-lines:]
