"""A process that has imported TensorFlow, Keras and distloop, and forks Python processes that need not do it again.

What it forks is a process of its own: own session, files, environment, arguments, devices and collectives; it ends
through the interpreter's own shutdown, or by a signal. Only the imports are shared, and with them the seed of `hash`.
TensorFlow starts no device and no collective until the first operation, so there is nothing that a fork could break.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2), Linux


@final
class Zygote:
    """The process that forks; it ends with the process that made it, what it forked does not."""

    def __init__(self, root: Path) -> None:
        # A forked process loses its parent at once and comes to us, so that we can wait for it.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(theirs.fileno())],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def fork(
        self, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], out: IO[Any], err: IO[Any]
    ) -> int:
        """Start `python <arguments>` (-m MODULE or -c CODE); return its pid, that of a child of this process."""
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "environment": dict(environment)})
        socket.send_fds(self._socket, [request.encode()], [out.fileno(), err.fileno()])
        reply = self._socket.recv(64)
        if not reply:
            raise RuntimeError(f"the process that forks has ended with {self._process.wait(10)}")
        return int(reply)


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process a request; return the request in the forked one, and None here when no more can come."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            return None
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid:
                os.write(writer, str(pid).encode())
                os._exit(0)  # which hands the forked process to the subreaper
            for descriptor in (reader, writer, requests.detach()):
                os.close(descriptor)
            for target, descriptor in zip((1, 2), files, strict=True):
                os.dup2(descriptor, target)
                os.close(descriptor)
            return json.loads(message)
        os.close(writer)
        os.waitpid(between, 0)
        requests.send(os.read(reader, 64))
        for descriptor in (reader, *files):
            os.close(descriptor)


def _become(request: dict[str, Any]) -> tuple[str, str]:
    """Make this process what `python <arguments>` would have made of it; return what is left to run."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    kind, what, *arguments = request["arguments"]
    sys.argv = [what if kind == "-m" else kind, *arguments]
    paths = request["environment"].get("PYTHONPATH", "").split(":")
    sys.path[:] = list(dict.fromkeys([request["cwd"] if kind == "-m" else "", *paths, *sys.path]))
    return kind, what


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import distloop.experiment
    import distloop.flags
    import distloop.gradients  # noqa: F401

    gc.collect()
    gc.freeze()  # what was imported is never collected: a forked process then neither walks nor copies it
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        kind, what = _become(request)
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _main()
