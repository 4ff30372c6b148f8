"""What small programs under a supervisor need: their rank, and to tell where they are as distloop's workers do.

python -c "from tests.worker_program import *; tell('step', 3); ..."
"""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from distloop.cluster import from_tf_config
from distloop.launcher import error_record
from distloop.launcher.beacon import Beacon

rank = from_tf_config(os.environ.get("TF_CONFIG")).index
beacon = Beacon.inherited(os.environ)
faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def tell(phase, step):
    """Say where this worker is."""
    beacon.tell(phase, step)


def forever():
    """Wait until someone kills this process, whatever else it is sent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def until_asked_to_stop():
    """Wait until the supervisor asks for a stop."""
    while not beacon.stop_asked:
        time.sleep(0.01)


def meet(name):
    """Wait until every worker of this attempt has come here."""
    Path(f"{name}.{rank}").touch()
    others = len(from_tf_config(os.environ.get("TF_CONFIG")).addresses)
    while not all(Path(f"{name}.{other}").exists() for other in range(others)):
        time.sleep(0.01)


def attempt():
    """Return how often this worker was started before in this folder, and count."""
    path = Path(f"attempt.{rank}")
    number = int(path.read_text()) if path.exists() else 0
    path.write_text(str(number + 1))
    return number


def fail(message, *, step, collateral=False, exit_code=1, kind="OSError"):
    """Record an error as distloop does, and exit."""
    record = {
        "host": "this host",
        "phase": "step",
        "step": step,
        "collateral": collateral,
        "exit_code": exit_code,
        "message": message,
        "summary": f"{kind}: {message}",
        "traceback": f"Traceback (most recent call last):\n{kind}: {message}\n",
        "time": time.time(),
    }
    error_record.hand_over(record)
    sys.stdout.flush()
    os._exit(exit_code)
