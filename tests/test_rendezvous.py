"""Supervisors that meet: threads with real sockets, several "hosts" being addresses of loopback."""

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from distloop.config import PortTakenError, PreflightError, Stopped
from distloop.launcher import agreement, rendezvous
from distloop.launcher.local import free_ports
from distloop.launcher.meeting import Ended
from distloop.launcher.topology import Place, Topology

FACTS = {"tensorflow": "2.21.0", "gpus": 0, "command": ["-m", "launch.train", "--epochs=5"]}


def places(*ports_each):
    ports = iter(free_ports(sum(ports_each)))
    return tuple(
        Place(f"127.0.0.{number}", tuple(next(ports) for _ in range(count)))
        for number, count in enumerate(ports_each, start=1)
    )


def meet(where, index, *, job="job", facts=FACTS, limit_secs=20.0, stop=lambda: False):
    """Return what `rendezvous.meet` returns or raises."""
    try:
        return rendezvous.meet(Topology(where, index), job, facts, limit_secs=limit_secs, stop=stop)
    except (PreflightError, Stopped) as error:
        return error


def all_meet(where, **differing):
    """Let all meet at once; `place_K=dict(...)` are other arguments for place K."""
    with ThreadPoolExecutor(len(where)) as pool:
        meetings = [pool.submit(meet, where, k, **differing.get(f"place_{k}", {})) for k in range(len(where))]
        return [meeting.result() for meeting in meetings]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = sorted(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


@contextlib.contextmanager
def listening(place, answer=b"", *, hold_secs=0.0):
    """Answer every connection to the first port of a place with some bytes, then close it."""
    with socket.create_server((place.host, place.ports[0])) as server, ThreadPoolExecutor() as pool:
        done = threading.Event()

        def serve():
            server.settimeout(0.05)
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    with server.accept()[0] as connection:
                        connection.recv(100) if answer else None
                        connection.sendall(answer)
                        done.wait(hold_secs)

        pool.submit(serve)
        try:
            yield
        finally:
            done.set()


@pytest.mark.parametrize("ports_each", [(1,), (1, 1), (2, 3), (2, 1, 4), (1,) * 8])
def test_all_meet_and_their_ports_can_be_bound_at_once(ports_each):
    where = places(*ports_each)
    for _ in range(3):  # as after each restart
        assert all_meet(where) == [None] * len(where)
        for place in where:
            for port in place.ports:
                server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
                assert server.add_insecure_port(f"0.0.0.0:{port}") == port  # as TensorFlow does
                server.stop(None)
