"""The record of the error by which a worker ends: what its supervisor, and a person, need to know of it.

The variable DISTLOOP_ERROR_FILE says where the supervisor looks for it.
"""

import json
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from distloop.errors import PeerLostError
from distloop.launcher.beacon import Beacon

VARIABLE = "DISTLOOP_ERROR_FILE"
_LONGEST = 300  # characters of a summary


def describe(error: BaseException, *, phase: str, step: int, collateral: bool = False) -> dict[str, Any]:
    """Describe an error in JSON values. `collateral`: it only follows from another worker's."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phase": phase,
        "step": step,
        "collateral": collateral,
        "exit_code": PeerLostError.exit_code if collateral else getattr(error, "exit_code", 1),
        "type": type(error).__name__,
        "message": str(error),
        "summary": summary(error),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "versions": {
            "python": sys.version.split()[0],
            **{name: sys.modules[name].__version__ for name in ("tensorflow", "keras") if name in sys.modules},
        },
    }


def summary(error: BaseException) -> str:
    """Return type and message in a line; of an error that TensorFlow wraps into another one, the inner one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inner = [line for line in lines[1:] if re.match(r"[\w.]*(Error|Exception|Interrupt): ", line)]
    if lines and lines[0].startswith("Graph execution error") and inner:
        return f"{inner[-1][:_LONGEST]} ({type(error).__name__})"
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def hand_over(content: dict[str, Any]) -> None:
    """Write a record to where the supervisor looks for it. The first counts: what comes later follows from it."""
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE])
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(content, indent=2) + "\n"
    try:
        if not path.exists():
            temporary.write_text(text)
            temporary.replace(path)
    except OSError:  # the disk is full, perhaps, which may be the error itself
        beacon = Beacon.inherited(os.environ)
        if beacon is not None and not beacon.left():
            beacon.leave(text.encode())
