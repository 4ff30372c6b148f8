"""How supervisors meet: each listens where its workers will, and dials the addresses of all others.

Who dials says its hello first, and the other answers with its own. The connection to the last port of a place stays
open; on it follows `ready` once its sender has met all. Who is ready, and has heard it from all, closes everything, and
TensorFlow can bind the ports. A hello with an `end`, or an `end` later, says that the run is over there.

One thread, and no call that waits, but for the resolution of a name, which takes as long as the system's resolver does.
"""

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

from distloop.errors import Stopped
from distloop.launcher import wire
from distloop.launcher.agreement import difference
from distloop.launcher.topology import Place, Topology
from distloop.say import say

_RETRY_SECS, _TICK_SECS = 0.2, 0.1
_QUIET_SECS = 3  # before a person is told whom this host waits for
_NAMED = 8  # missing hosts in one message


class Ended(NamedTuple):
    """Say that the run is over on a host, with which exit code and why."""

    host: str
    code: int
    reason: str


@final
class _Peer:
    """What is known of another place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.address = f"port {place.ports[0]}"
        self.problem = "has not answered yet"
        self.session: str | None = None  # of its supervisor, which may be killed and come back as another one
        self.told = False  # knows that this place has ended, or has ended itself
        self.tries = 0
        self.retry = 0.0
        self.ready = False
        self.start_over()

    def start_over(self) -> None:
        self.dialled: wire.Connection | None = None
        self.answered = 0  # of its ports
        self.ready_said = False

    @property
    def has_answered(self) -> bool:
        # It closes this connection once it has heard that all are ready; its own `ready`, on another, may come later.
        return self.answered == len(self.place.ports) and (self.dialled is not None or self.ready_said)

    @property
    def is_met(self) -> bool:
        sent = self.dialled is None or not self.dialled.outbox
        return self.has_answered and self.ready and self.ready_said and sent

    @property
    def is_here(self) -> bool:
        return self.has_answered and self.dialled is not None

    def __str__(self) -> str:
        problem = "is here, but has not met all others" if self.is_here else self.problem
        return f"host {self.place.host} ({self.address}), which {problem}"


@final
class Meeting:
    """All connections of this place; the end of its `with` closes them."""

    def __init__(self, topology: Topology, job: str, facts: Mapping[str, Any]) -> None:
        self.problem: str | None = None  # for which nobody can start
        self.heard: Ended | None = None
        self._ended = False
        self._place = topology.here
        self._hello = {
            "job": job,
            "place": topology.index,
            "host": topology.here.host,
            "machine": socket.gethostname(),
            "session": os.urandom(8).hex(),
            "facts": facts,
            "end": None,
        }
        self._peers = {k: _Peer(place) for k, place in enumerate(topology.places) if k != topology.index}
        self._connections: set[wire.Connection] = set()
        self._listeners: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        for open_socket in [*self._listeners.values(), *(connection.socket for connection in self._connections)]:
            open_socket.close()
        self._selector.close()

    def listen(self) -> None:
        """Begin to answer on the ports of this place. Raises PortTakenError."""
        for port in self._place.ports:
            listener = wire.listen(port)
            self._listeners[listener.fileno()] = listener
            self._selector.register(listener, selectors.EVENT_READ)

    def is_decided(self) -> bool:
        """Tell whether all are here and know it, or nobody can start."""
        return bool(self.problem or self.heard) or not self._missing()

    def missing(self) -> str:
        """Say who is not here, and why, as far as that can be seen."""
        missing = self._missing()
        missing = [peer for peer in missing if not peer.is_here] or missing  # on whom the others wait, too
        more = [f"{len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
        return "; ".join([*map(str, missing[:_NAMED]), *more])

    def tell(self, ended: Ended, *, limit_secs: float, stop: Callable[[], bool]) -> None:
        """Let all know that the run is over."""
        self._ended = True
        self._hello["end"] = ended._asdict()
        for connection in self._connections:
            if connection.place is not None:
                connection.say({"end": ended._asdict()})
        self.run(lambda: not self._missing(), limit_secs=limit_secs, stop=stop)

    def run(self, until: Callable[[], bool], *, limit_secs: float, stop: Callable[[], bool]) -> None:
        """Dial and answer until then, or until the limit. Raises Stopped."""
        begin = time.monotonic()
        said, say_next = "", begin + _QUIET_SECS
        while not until() and (now := time.monotonic()) < begin + limit_secs:
            if stop():
                raise Stopped(f"stopped before the workers were started, while waiting for {self.missing()}.")
            self._dial(now)
            self._say_ready()
            for connection in [c for c in self._connections if c.deadline and now > c.deadline]:
                late = TimeoutError(errno.ETIMEDOUT, "") if connection.outbox else ValueError("it says nothing")
                self._lose(connection, late)
            self._wait()
            if now > say_next and said != (said := self.missing()):
                what = "the run is over here, as others are to hear: waiting" if self._ended else "waiting"
                say(f"{what} for {said}; for {begin + limit_secs - now:.0f} s at most.")
                say_next = now + _QUIET_SECS

    def _missing(self) -> list[_Peer]:
        return [peer for peer in self._peers.values() if not (peer.told if self._ended else peer.is_met)]

    def _dial(self, now: float) -> None:
        for index, peer in self._peers.items():
            if peer.dialled or now < peer.retry or (peer.told if self._ended else peer.has_answered):
                continue
            port = peer.place.ports[peer.answered % len(peer.place.ports)]
            peer.address = f"port {port}"
            try:
                found = wire.resolve(peer.place.host, port)
                family, address = found[peer.tries % len(found)]
                peer.address, peer.tries = _text(address), peer.tries + 1
                peer.dialled = self._keep(wire.Connection(wire.dial(family, address), index))
                peer.dialled.say({"hello": self._hello})
            except (OSError, UnicodeError) as error:
                peer.problem = wire.problem(error)
                # A resolver that takes its time takes it from those who dial this host.
                peer.retry = time.monotonic() + max(_RETRY_SECS, 4 * (time.monotonic() - now))

    def _say_ready(self) -> None:
        if not self._ended and all(peer.has_answered for peer in self._peers.values()):
            for peer in self._peers.values():
                if peer.dialled and not peer.ready_said:
                    peer.dialled.say({"ready": True})
                peer.ready_said = True

    def _wait(self) -> None:
        for connection in self._connections:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outbox else 0)
            self._selector.modify(connection.socket, wanted, connection)
        for key, events in self._selector.select(_TICK_SECS):
            if key.data is None:
                with contextlib.suppress(OSError):  # who called has gone already
                    self._keep(wire.Connection(self._listeners[key.fd].accept()[0]))
            elif key.data in self._connections:  # not closed by what came before
                self._advance(key.data, events)

    def _advance(self, connection: wire.Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                connection.send()
            for message in connection.receive() if events & selectors.EVENT_READ else ():
                self._hear(connection, message)
        except (OSError, ValueError) as error:
            self._lose(connection, error)
        except (AttributeError, KeyError, TypeError):
            self._lose(connection, ValueError("it says something else"))

    def _hear(self, connection: wire.Connection, message: Mapping[str, Any]) -> None:
        if "hello" in message:
            self._greet(connection, message["hello"])
        elif connection.place is None:
            raise ValueError("it says no hello")
        elif "end" in message:
            self._hear_end(self._peers[connection.place], message["end"])
        else:
            self._peers[connection.place].ready = message["ready"]

    def _greet(self, connection: wire.Connection, hello: Mapping[str, Any]) -> None:
        expected = connection.place  # None if the other has dialled
        if expected is None:
            connection.say({"hello": self._hello})
            connection.send()
        if hello["job"] != self._hello["job"]:
            raise ValueError(f"it is the job {hello['job']} of host {hello['host']}")
        if hello["session"] == self._hello["session"]:
            raise ValueError("it is this host itself")
        if hello["place"] in self._peers:
            connection.place, connection.deadline = hello["place"], None
        if self._hello["facts"] and hello["facts"]:  # who has ended says none
            self.problem = self.problem or difference(self._hello, hello, expected)
        if hello["place"] != connection.place or self.problem:
            return
        peer = self._peers[hello["place"]]
        if peer.session not in (None, hello["session"]):  # it was killed and has come back
            if peer.dialled:
                self._close(peer.dialled)
            peer.start_over()
            peer.ready = False
        peer.session = hello["session"]
        if hello["end"]:
            self._hear_end(peer, hello["end"])
        if peer.dialled is connection:
            peer.answered += 1
            peer.told |= self._ended and not connection.outbox
            if peer.answered < len(peer.place.ports):
                self._close(connection)
                peer.dialled, peer.retry = None, 0.0

    def _hear_end(self, peer: _Peer, end: Mapping[str, Any]) -> None:
        if self._ended:
            peer.told = True
        else:
            self.heard = Ended(**end)

    def _keep(self, connection: wire.Connection) -> wire.Connection:
        self._connections.add(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def _close(self, connection: wire.Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _lose(self, connection: wire.Connection, error: Exception) -> None:
        self._close(connection)
        if connection.place is None:
            return  # somebody who is not of this job
        peer = self._peers[connection.place]
        peer.told |= self._ended and connection.deadline is None
        if peer.dialled is connection:
            was_here = connection.deadline is None
            peer.problem = "was here, and has gone" if was_here else wire.problem(error)
            peer.dialled, peer.retry = None, time.monotonic() + _RETRY_SECS
            if not peer.ready_said:
                peer.start_over()


def _text(address: tuple[Any, ...]) -> str:
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
