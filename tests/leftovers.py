"""What tests must not leave behind: processes (and with them ports), shared memory, temporary files.

A pytest plugin, loaded by conftest.py. All that a test session starts inherits a variable, by which it is found.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

MARK = "DISTLOOP_TEST_SESSION"
GONE_SECS = 10  # in which what is ending must be gone
_OF_TENSORFLOW = "__autograph_generated_file*.py"  # which it removes at its end, but not when it is killed


def pytest_configure(config):
    """Begin a session, in the process that starts the others."""
    if not hasattr(config, "workerinput"):
        config.stash[_SESSION] = _Session()


def pytest_sessionfinish(session):
    """Fail the session for what is left, and remove it."""
    if _SESSION in session.config.stash and (left := session.config.stash[_SESSION].end()):
        print("\nLEFT BEHIND by tests:\n  " + "\n  ".join(left))
        session.exitstatus = 1


class _Session:
    def __init__(self):
        self._temp = tempfile.mkdtemp(prefix="distloop_tests_")
        self._shared = set(Path("/dev/shm").iterdir())
        self._mark = f"{MARK}={os.getpid()}"
        os.environ[MARK] = str(os.getpid())
        os.environ["DISTLOOP_TEST_TEMP"] = self._temp

    def end(self):
        limit = time.monotonic() + GONE_SECS
        while (left := self._left()) and time.monotonic() < limit:
            time.sleep(0.1)
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._temp)
        return left

    def _left(self):
        return [
            *(f"process {pid}: {command}" for pid, command in self._processes()),
            *map(str, set(Path("/dev/shm").iterdir()) - self._shared),
            *(str(path) for path in Path(self._temp).rglob("*") if not path.match(_OF_TENSORFLOW)),
        ]

    def _processes(self):
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                ours = self._mark.encode() in (path / "environ").read_bytes().split(b"\0")
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state, _, _, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
                # It ends with this process; what it forks has the same command, but a session of its own.
                is_zygote = "tests.zygote" in command and int(session) == os.getsid(0)
                if ours and state != "Z" and not is_zygote:
                    found.append((int(path.name), command[:200]))
        return found


_SESSION = pytest.StashKey[_Session]()
