"""Lines of JSON over TCP without waiting: listeners where TensorFlow will listen, connections, and what was wrong."""

import contextlib
import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any, final

from distloop.errors import PortTakenError
from distloop.launcher.ports import holder

ANSWER_SECS = 5  # for a connection to be made, and then for its first line
NOT_THIS_JOB = "answers, but not as this job"
_MOST_BYTES = 2**20  # of a line
_PROBLEMS = {
    errno.ECONNREFUSED: "refuses the connection: nothing listens there",
    errno.ECONNRESET: f"{NOT_THIS_JOB}: it closes the connection",
    errno.EPIPE: f"{NOT_THIS_JOB}: it closes the connection",
    errno.ETIMEDOUT: "does not answer",
}


@final
class Connection:
    """A connection, with what has come and what is still to go. `place` is whose it is, None until it says so."""

    def __init__(self, connection: socket.socket, place: int | None = None) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.place = place
        self.deadline: float | None = time.monotonic() + ANSWER_SECS
        self.outbox = b""
        self._inbox = b""

    def say(self, message: dict[str, Any]) -> None:
        """Send a message when the connection can take it."""
        self.outbox += json.dumps(message).encode() + b"\n"

    def send(self) -> None:
        """Send what can be sent now. Raises OSError, also for a connection that could not be made."""
        with contextlib.suppress(BlockingIOError):
            self.outbox = self.outbox[self.socket.send(self.outbox) :]

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come. Raises OSError, and ValueError for what no supervisor says."""
        with contextlib.suppress(BlockingIOError):
            data = self.socket.recv(2**16)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "closed")
            self._inbox += data
        if self._inbox[3:5] == b"\x04\x00":  # HTTP/2's frame SETTINGS, which a server says first (RFC 9113, 3.4)
            raise ValueError("it speaks gRPC, as a worker does")
        *whole, self._inbox = self._inbox.split(b"\n")
        if self._inbox and (self._inbox[:1] != b"{" or len(self._inbox) > _MOST_BYTES):
            raise ValueError(_strange(self._inbox))
        return [_message(line) for line in whole]


def _message(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    raise ValueError(_strange(line))


def _strange(said: bytes) -> str:
    return f"it says {said[:40]!r}"


def listen(port: int) -> socket.socket:
    """Listen where TensorFlow will: on all addresses of this host, IPv4 and IPv6. Raises PortTakenError."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTakenError(
            f"port {port} of this host is taken by {holder(port) or 'another process'}; end it, or give another --port "
            "on every host (or in TF_CONFIG, where that is set by hand)."
        ) from error
    listener.setblocking(False)
    return listener


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return the families and addresses of a name. Raises OSError."""
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def dial(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    """Begin a connection. Raises OSError."""
    connection = socket.socket(family)
    connection.setblocking(False)
    number = connection.connect_ex(address)
    if number not in (0, errno.EINPROGRESS):
        connection.close()
        raise OSError(number, os.strerror(number))
    return connection


def reach(addresses: Sequence[tuple[str, int]], *, limit_secs: float) -> list[Exception | None]:
    """Dial all addresses at once; return for each what went wrong, None if something listens there."""
    found: list[Exception | None] = [TimeoutError(errno.ETIMEDOUT, "")] * len(addresses)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for index, (host, port) in enumerate(addresses):
            try:
                connection = stack.enter_context(dial(*resolve(host, port)[0]))
                selector.register(connection, selectors.EVENT_WRITE, index)
            except (OSError, UnicodeError) as error:
                found[index] = error
        limit = time.monotonic() + limit_secs
        while selector.get_map() and (left := limit - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                connection = selector.unregister(key.fileobj).fileobj
                assert isinstance(connection, socket.socket)
                number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found[key.data] = OSError(number, os.strerror(number)) if number else None
    return found


def problem(error: Exception) -> str:
    """Say in words why a host could not be spoken to."""
    if isinstance(error, socket.gaierror):
        return f"does not resolve to an address ({error.strerror})"
    if isinstance(error, OSError) and error.errno is not None:
        return _PROBLEMS.get(error.errno, f"cannot be reached ({os.strerror(error.errno)})")
    return f"{NOT_THIS_JOB}: {error}"
