"""Call a function of a test in every worker of a cluster: python -m tests.in_workers MODULE:FUNCTION OUT [REPLICAS].

The function gets the strategy and the path OUT.worker<index>.npz without its ending, and returns arrays to save there.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

from distloop import runtime
from distloop.cluster import from_tf_config
from distloop.strategies import make_strategy
from tests import harness


def run(function: str, out: Path, *, workers: int = 2, replicas: int | None = None, limit_secs: float = 90):
    """Return what each worker's call returned, as dicts of arrays."""
    arguments = ["-m", "tests.in_workers", function, str(out), *([str(replicas)] if replicas else [])]
    for code, stdout, err in harness.run_workers(arguments, workers=workers, limit_secs=limit_secs):
        assert code == 0, stdout + err
    return [dict(np.load(f"{out}.worker{index}.npz")) for index in range(workers)]


def main() -> None:
    (module, _, function), out = sys.argv[1].partition(":"), sys.argv[2]
    replicas = int(sys.argv[3]) if len(sys.argv) > 3 else None
    workers = from_tf_config(os.environ["TF_CONFIG"])
    runtime.initialize(replicas=replicas, seed=0, precision="float32")
    strategy = make_strategy("multiworker", cluster=workers, replicas=replicas)
    np.savez(f"{out}.worker{workers.index}.npz", **getattr(importlib.import_module(module), function)(strategy))


if __name__ == "__main__":
    main()
