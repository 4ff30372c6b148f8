"""Supervisors that meet: threads with real sockets, several "hosts" being addresses of loopback."""

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distloop.errors import PortTakenError, PreflightError, Stopped
from distloop.launcher import agreement, rendezvous
from distloop.launcher.meeting import Ended
from distloop.launcher.processes import free_ports
from distloop.launcher.topology import Place, Topology
from tests.harness import until

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
        return rendezvous.meet(Topology(tuple(where), index), job, facts, limit_secs=limit_secs, stop=stop)
    except (PreflightError, Stopped) as error:
        return error


def all_meet(where, **differing):
    """Let all meet at once; `place_K=dict(...)` are other arguments for place K."""
    with ThreadPoolExecutor(len(where)) as pool:
        meetings = [pool.submit(meet, where, k, **differing.get(f"place_{k}", {})) for k in range(len(where))]
        return [meeting.result() for meeting in meetings]


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = sorted(Path("/proc/self/fd").iterdir())
    threads = threading.active_count()
    yield
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert threading.active_count() == threads


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("distloop.launcher.wire.ANSWER_SECS", 0.3)
    monkeypatch.setattr("distloop.launcher.rendezvous.TELL_SECS", 0.3)


@contextlib.contextmanager
def listening(place, answer=b"", *, hold_secs=0.0):
    """Answer every connection to the first port of a place with some bytes, then close it."""
    with socket.create_server((place.host, place.ports[0])) as server, ThreadPoolExecutor() as pool:
        done = threading.Event()

        def serve():
            server.settimeout(0.05)
            while not done.is_set():
                with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
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
                socket.create_server(("", port)).close()  # with SO_REUSEADDR, as gRPC has it


def test_who_is_late_is_waited_for_and_named_meanwhile(monkeypatch):
    # Not capfd: what a thread writes while another reads and truncates the captured file is lost.
    said, spoken = [], threading.Event()
    monkeypatch.setattr("distloop.launcher.meeting.say", lambda sentence: (said.append(sentence), spoken.set()))
    monkeypatch.setattr("distloop.launcher.meeting._QUIET_SECS", 0.3)
    where = places(1, 2, 1)
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(meet, where, k) for k in (0, 1)]
        assert spoken.wait(20)
        assert meet(where, 2) is None
        assert [meeting.result() for meeting in early] == [None, None]
    port = where[2].ports[0]
    problem = "refuses the connection: nothing listens there"
    assert f"waiting for host 127.0.0.3 (127.0.0.3:{port}), which {problem}; for 20 s at most." in said


def absent(_):
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (absent, "refuses the connection: nothing listens there"),
        (lambda place: listening(place, hold_secs=60), "answers, but not as this job: it says nothing"),
        (lambda place: listening(place), "answers, but not as this job: it closes the connection"),
        (lambda place: listening(place, b"SSH-2.0-OpenSSH_9.2\r\n"), "answers, but not as this job: it says b'SSH-2.0"),
        (lambda place: listening(place, b'{"hello": {}}\n'), "answers, but not as this job: it says something else"),
        (lambda place: listening(place, b"{}{\n"), "answers, but not as this job: it says b'{}{'"),
        (
            lambda place: listening(place, b"\0\0\x24\4\0\0\0\0\0"),
            "but not as this job: it speaks gRPC, as a worker does",
        ),
    ],
)
def test_who_does_not_come_is_named_with_the_reason(there, expected):
    where = places(1, 2)
    with there(where[1]):
        error = meet(where, 0, limit_secs=0.6)
    assert isinstance(error, PreflightError)
    assert str(error).startswith("waited 1 s for host 127.0.0.2 (127.0.0.2:")
    assert expected in str(error)
    assert str(error).endswith("Start the same command on every host, or give more time with --start_timeout.")


def test_a_name_that_does_not_resolve_is_told():
    error = meet((places(1)[0], Place("nosuch.invalid", (7,))), 0, limit_secs=0.5)
    assert "host nosuch.invalid (port 7), which does not resolve to an address (" in str(error)


def test_of_many_missing_hosts_some_are_named():
    where = places(*[1] * 12)
    error = meet(where, 0, limit_secs=0.5)
    assert str(error).count("refuses the connection") == 8
    assert "; 3 more. Start" in str(error)


def test_who_is_here_is_not_blamed_for_another_that_is_missing():
    where = places(1, 1, 1)
    brief = dict(limit_secs=1)
    *here, _ = all_meet(where, place_0=brief, place_1=brief, place_2=dict(job="elsewhere", **brief))
    for error in here:
        assert "host 127.0.0.3 (" in str(error)
        assert "answers, but not as this job: it is the job elsewhere of host 127.0.0.3" in str(error)
        assert "not met all others" not in str(error)


def test_two_jobs_do_not_disturb_each_other():
    ours, theirs = places(1, 1), places(1, 1)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(meet, where, k, job=job) for job, where in (("a", ours), ("b", theirs)) for k in (0, 1)]
        assert [meeting.result() for meeting in found] == [None] * 4


DIFFERENT = [
    ({"tensorflow": "2.20.0"}, "has tensorflow 2.20.0 (host {us}: 2.21.0); install the same versions on all hosts."),
    ({"gpus": 8}, "has gpus 8 (host {us}: 0); give every host as many GPUs."),
    (
        {"command": ["-m", "launch.train", "--epochs=6", "--seed=1"]},
        "has command --epochs=6 --seed=1 (host {us}: --epochs=5); start the same command on every host.",
    ),
    (
        {"command": ["-m", "launch.train"]},
        "has command nothing (host {us}: --epochs=5); start the same command on every host.",
    ),
    (
        {"tensorflow": "2.20.0", "gpus": 8},
        "has tensorflow 2.20.0 (host {us}: 2.21.0), gpus 8 (host {us}: 0); install the same versions on all hosts.",
    ),
]


@pytest.mark.parametrize(("theirs", "expected"), DIFFERENT)
def test_hosts_that_differ_end_at_once_and_each_tells_it(theirs, expected):
    where = places(1, 2, 1)
    began = time.monotonic()
    errors = all_meet(where, place_2=dict(facts={**FACTS, **theirs}))
    assert time.monotonic() - began < 5
    for error in errors:
        said = error.reason if isinstance(error, Ended) else str(error)
        assert isinstance(error, PreflightError) or error.code == PreflightError.exit_code
        assert "127.0.0.3 has " in said or "(host 127.0.0.3: " in said
    assert isinstance(errors[2], PreflightError)
    first = next(str(error) for error in errors[:2] if isinstance(error, PreflightError))
    assert first.startswith("host 127.0.0.3 " + expected.format(us=first.split("(host ")[1].split(":")[0]))


def test_a_host_index_given_twice_is_told():
    where = places(1, 1)
    there = (where[0], Place("127.0.0.2", where[1].ports))
    with ThreadPoolExecutor(2) as pool:
        wrong = pool.submit(meet, (there[1], there[0]), 0)  # listens where place 1 is expected
        right = meet(there, 0)
        for error in (right, wrong.result()):
            assert f"two hosts, {socket.gethostname()} and {socket.gethostname()}, say that they are number 0" in str(
                error
            )
            assert "give each its own --host_index." in str(error)


def test_a_host_that_is_another_one_than_expected_is_told():
    where = places(1, 1, 1)
    swapped = (where[0], where[2], where[1])
    errors = all_meet(where, place_1=dict())[:0]
    with ThreadPoolExecutor(3) as pool:
        # Each listens at its own address, but the first believes in another order.
        found = [pool.submit(meet, order, k) for order, k in ((swapped, 0), (where, 1), (where, 2))]
        errors = [meeting.result() for meeting in found]
    assert any("answers as number" in str(error) and "was expected; give each host" in str(error) for error in errors)


def test_a_name_that_leads_back_to_this_host_is_told():
    (here,) = places(1)
    error = meet((here, Place("localhost", here.ports)), 0, limit_secs=0.5)
    assert "host localhost (127.0.0.1:" in str(error)
    assert "answers, but not as this job: it is this host itself" in str(error)


def tell(where, index, ended, limit_secs=20.0):
    rendezvous.tell_the_end(Topology(where, index), "job", ended, limit_secs=limit_secs, stop=lambda: False)


def test_a_run_that_is_over_on_one_host_is_over_on_all():
    where = places(2, 1, 3)
    ended = Ended("127.0.0.1", 65, "loss is not finite")
    with ThreadPoolExecutor(3) as pool:
        telling = pool.submit(tell, where, 0, ended)
        later = [pool.submit(meet, where, 1)]
        assert later[0].result() == ended
        assert not telling.done()
        later.append(pool.submit(meet, where, 2))
        assert later[1].result() == ended
        telling.result(timeout=5)


def test_who_waits_for_others_hears_of_the_end_too():
    where = places(1, 2, 1)
    ended = Ended("127.0.0.3", 1, "ValueError")
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(meet, where, k) for k in (0, 1)]
        tell(where, 2, ended)
        assert [meeting.result() for meeting in waiting] == [ended, ended]


def test_hosts_whose_runs_are_over_do_not_wait_for_each_other():
    where = places(1, 1, 1)
    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        for telling in [pool.submit(tell, where, k, Ended(where[k].host, 64, "flags")) for k in range(3)]:
            telling.result()
    assert time.monotonic() - began < 3


def test_telling_of_the_end_has_an_end():
    began = time.monotonic()
    tell(places(1, 1), 0, Ended("127.0.0.1", 1, ""), limit_secs=0.5)
    assert 0.5 < time.monotonic() - began < 1.5


def test_a_port_of_this_host_that_is_taken_is_told_at_once_with_its_holder():
    where = places(1, 1)
    with socket.create_server(("127.0.0.1", where[0].ports[0])), pytest.raises(PortTakenError) as caught:
        rendezvous.meet(Topology(where, 0), "job", FACTS, limit_secs=20, stop=lambda: False)
    assert str(caught.value).startswith(f"port {where[0].ports[0]} of this host is taken by process {os.getpid()} (")
    assert str(caught.value).endswith(
        "); end it, or give another --port on every host (or in TF_CONFIG, where that is set by hand)."
    )


def test_others_hear_that_a_port_is_taken():
    where = places(1, 1, 1)
    with socket.create_server(("127.0.0.2", where[1].ports[0])):
        first, taken, last = all_meet(where)
    assert isinstance(taken, PortTakenError)
    assert first == last == Ended("127.0.0.2", PreflightError.exit_code, str(taken))


def test_a_request_to_stop_ends_the_waiting():
    stop = threading.Event()
    where = places(1, 1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(meet, where, 0, stop=stop.is_set)
        stop.set()
        error = waiting.result(timeout=5)
    assert isinstance(error, Stopped)
    assert str(error).startswith("stopped before the workers were started, while waiting for host 127.0.0.2 (")


def connected(place):
    """Return a connection to a place, once it listens."""
    made = []

    def connect():
        with contextlib.suppress(ConnectionRefusedError):
            made.append(socket.create_connection((place.host, place.ports[0]), timeout=20))
        return made

    until(connect, limit_secs=20)
    return made[0]


def test_strangers_do_no_harm():
    where = places(1, 1)
    claim = {"job": "job", "place": 1, "session": "x", "host": "c", "machine": "c", "facts": FACTS, "end": None}
    wrong = [dict(place=7), dict(place=[]), dict(facts="x"), dict(end={"a": 1}), {}]
    hellos = [3, [], *({**claim, **other} for other in wrong)]
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b'{"end": {}}\n', b"\xff" * 9, b'{"a":' * 10**5 + b"\n"]
    said += [json.dumps({"hello": hello}).encode() + b"\n" for hello in hellos]
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        waiting = pool.submit(meet, where, 0)
        for line in said:
            stack.enter_context(connected(where[0])).sendall(line)
        assert meet(where, 1) is None
        assert waiting.result() is None


@pytest.mark.parametrize("hosts", [("::1", "127.0.0.1"), ("[::1]", "::1")])
def test_hosts_meet_over_ipv6(hosts):
    ports = free_ports(2)
    where = tuple(Place(host, (port,)) for host, port in zip(hosts, ports, strict=True))
    assert all_meet(where) == [None, None]


@pytest.mark.parametrize("own", [["--data_dir=/a"], ["--data_dir", "/a"]])
def test_the_facts_are_versions_workers_gpus_and_the_arguments_of_the_command(own):
    where = places(1, 2)
    found = agreement.facts(["/opt/a/python", "-m", "launch.train", *own, "--epochs=5"], Topology(where, 1), gpus=2)
    assert found["command"] == ["-m", "launch.train", "--epochs=5"]
    assert found["workers"] == [f"{place.host}:{port}" for place in where for port in place.ports]
    assert list(found) == ["distloop", "python", "tensorflow", "keras", "workers", "gpus", "command"]
    assert all(found[name] for name in ("distloop", "python", "tensorflow", "keras"))
    assert json.loads(json.dumps(found)) == found
