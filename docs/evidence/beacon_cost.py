"""What it costs that a compiled step says where it is: the same steps with and without the marks, call by call in turn.

python docs/evidence/beacon_cost.py [REPLICAS]
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from distloop import RunConfig, runtime
from distloop.cluster import Cluster
from distloop.position import Position
from distloop.strategies import choose, make_strategy
from tests import toy

CALLS, STEPS = 60, 500


def main() -> None:
    """Measure, and print a line for each figure."""
    replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    runtime.initialize(replicas=replicas, seed=0, precision="float32")
    name = choose("auto", cluster=Cluster(), replicas=replicas)
    strategy = make_strategy(name, cluster=Cluster(), replicas=replicas)
    task, mark = toy.make_task(RunConfig()), Position.mark
    calls = {"with": toy.compiled(strategy, task)[2]}
    Position.mark = lambda self, after=(): tf.no_op()
    calls["without"] = toy.compiled(strategy, task)[2]
    Position.mark = mark
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(CALLS):
        for kind, call in calls.items():
            began = time.perf_counter()
            call(STEPS)
            times[kind].append((time.perf_counter() - began) / STEPS * 1e6)
    medians = {kind: np.median(values[5:]) for kind, values in times.items()}
    differences = np.subtract(times["with"][5:], times["without"][5:])
    position = calls["with"].position
    began = time.perf_counter()
    for _ in range(1000):
        position.read()
    reading = (time.perf_counter() - began) * 1000
    print(
        f"{name}, {replicas} replica(s): {medians['with']:.1f} us a step with marks, {medians['without']:.1f} without"
    )
    print(f"difference of neighbouring calls: median {np.median(differences):.2f} us a step")
    print(f"reading it: {reading:.1f} us, 5 times a second")


if __name__ == "__main__":
    main()
