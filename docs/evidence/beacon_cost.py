"""What it costs that a compiled step says where it is: the same steps with and without the marks, call by call in turn.

python docs/evidence/beacon_cost.py [REPLICAS]
"""

import os
import sys
import time
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from distloop import RunConfig, runtime
from distloop.cluster import Cluster
from distloop.position import Position
from distloop.strategies import choose, make_strategy
from tests import toy

CALLS, STEPS = 400, 100


def no_mark(_: Position, after: Any) -> tf.Operation:
    """Count nothing."""
    return tf.no_op()


def main() -> None:
    """Print the time of a step with marks and without, and of a look at them."""
    replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    runtime.initialize(replicas=replicas, seed=0, precision="float32")
    name = choose("auto", cluster=Cluster(), replicas=replicas)
    strategy = make_strategy(name, cluster=Cluster(), replicas=replicas)
    task = toy.make_task(RunConfig())
    calls = {"with": toy.compiled(strategy, task)[2]}
    with mock.patch.multiple(Position, mark_batch=no_mark, mark_part=no_mark, mark_step=no_mark):
        calls["without"] = toy.compiled(strategy, task)[2]
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for number in range(CALLS):
        for kind in sorted(calls, reverse=bool(number % 2)):
            began = time.perf_counter()
            calls[kind](STEPS)
            times[kind].append((time.perf_counter() - began) / STEPS * 1e6)
    # Other programs only ever add time.
    for what, quantile in (("fastest tenth", 0.1), ("median", 0.5)):
        found = {kind: np.quantile(values, quantile) for kind, values in times.items()}
        difference = found["with"] - found["without"]
        print(f"{name}, {replicas} replica(s), {what} of the calls: {found['with']:.1f} us a step", end="")
        print(f", {found['without']:.1f} without marks: {difference:+.1f}")
    position = calls["with"].position
    began = time.perf_counter()
    for _ in range(1000):
        position.read()
    print(f"to look: {(time.perf_counter() - began) * 1000:.1f} us, 5 times a second")


if __name__ == "__main__":
    main()
