"""The record of the error by which a worker ends: what its supervisor, and a person, need to know of it.

The variable DISTLOOP_ERROR_FILE says where the supervisor looks for it.
"""

import contextlib
import json
import os
import platform
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from distloop.config import PeerLostError

VARIABLE = "DISTLOOP_ERROR_FILE"


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
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "versions": {
            "python": platform.python_version(),
            **{name: sys.modules[name].__version__ for name in ("tensorflow", "keras") if name in sys.modules},
        },
    }


def hand_over(content: dict[str, Any]) -> None:
    """Write a record to where the supervisor looks for it. The first counts: what comes later follows from it."""
    if VARIABLE not in os.environ:
        return
    path = Path(os.environ[VARIABLE])
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(OSError):  # the supervisor still has the log
        if not path.exists():
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            temporary.replace(path)
