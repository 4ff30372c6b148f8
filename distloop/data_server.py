"""One process of a tf.data service: `python -m distloop.data_server dispatcher PORT`, or `worker DISPATCHER HOST`.

It prints a line once it serves, and ends when it is killed.
"""

import sys
from typing import Any

from distloop.errors import UsageError
from distloop.flags import silence
from distloop.say import say

_BEAT_MS = 1_000  # how often a worker tells the dispatcher that it lives,
_LOST_MS = 20_000  # and how long it may say nothing


def main(kind: str, *settings: str) -> None:
    """Serve as a dispatcher, or as a worker of one."""
    with silence():
        import tensorflow as tf
    service: Any = tf.data.experimental.service
    try:
        if kind == "dispatcher":
            server = service.DispatchServer(service.DispatcherConfig(port=int(settings[0]), worker_timeout_ms=_LOST_MS))
        else:
            dispatcher, host = settings
            server = service.WorkerServer(
                service.WorkerConfig(dispatcher, worker_address=f"{host}:%port%", heartbeat_interval_ms=_BEAT_MS)
            )
    except tf.errors.OpError as error:
        say(f"the {kind} of the tf.data service cannot start ({error.message}).")
        sys.exit(UsageError.exit_code)
    print("serving", flush=True)
    server.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
