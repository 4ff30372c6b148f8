"""One supervisor a host, on hosts that share no network stack: they start, lose each other, and come back together."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distloop.config import PreflightError
from tests import namespaces
from tests.harness import finish

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_is_left():
    namespaces.skip_unless_possible()
    yield
    assert "dl-" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not list(Path("/etc/netns").glob("dl-*"))


@pytest.fixture
def pair():
    with namespaces.hosts(2) as found:
        yield found
        assert [host.pids() for host in found] == [[], []]


PROGRAM = "import os, time; from tests.worker_program import *; "


def supervise(host, everyone, tmp_path, *flags, program=PROGRAM + "print('rank', rank, flush=True)", **environment):
    """Start the supervisor of a host for a small program."""
    names = ",".join(other.name for other in everyone)
    return host.start(
        *("-m", "launch.run", f"--hosts={names}", f"--log_dir={tmp_path / 'logs'}", "--console=all", *flags),
        *("--", sys.executable, "-c", program, f"--workdir={tmp_path}"),
        **environment,
    )


def test_hosts_start_together_and_find_their_own_place(pair, tmp_path):
    # The second comes late.
    first = supervise(pair[0], pair, tmp_path, "--workers=2")
    while "waiting for host b (10.77.0.2:" not in first.output()[1]:
        time.sleep(0.05)
    second = supervise(pair[1], pair, tmp_path, "--workers=2")
    results = [finish(process, limit_secs=60) for process in (first, second)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sorted(results[0][1].splitlines()) == ["[rank 0] rank 0", "[rank 1] rank 1"]
    assert sorted(results[1][1].splitlines()) == ["[rank 2] rank 2", "[rank 3] rank 3"]


def test_a_host_that_does_not_come_is_named(pair, tmp_path):
    code, out, err = finish(supervise(pair[0], pair, tmp_path, "--start_timeout=1"), limit_secs=30)
    assert code == PreflightError.exit_code
    assert not out
    assert "waited 1 s for host b (10.77.0.2:" in err
    assert "which refuses the connection: nothing listens there. Start the same command on every host" in err
