"""What each safety feature costs a step.

python docs/evidence/safety_features.py 1 filters=16,hidden=32      # replicas, --task_args of mnist_cnn

One process, constant batches of 64 a replica. Steps
with everything and steps without one feature are compiled side by side and take turns; the cost is the median of the
differences between neighbours in time, with the 95 % bootstrap interval of that median.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from scipy.stats import bootstrap

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import feeding
from distloop import RunConfig, cluster, gradients, startup, steps
from distloop.lifecycle import Lifecycle
from distloop.metrics import Metric, divide
from distloop.position import Position
from distloop.storage import as_path

ROUNDS, WINDOW_SECS = 60, 0.1


def no_metrics(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step whose metrics are not used, so that TensorFlow leaves out what computes and carries them."""

    def run(state: Any, batch: Any) -> dict[str, Metric]:
        step(state, batch)
        return {"one": Metric((tf.constant(1.0), tf.constant(1.0)), divide, reduced=True)}

    return run


def never(_: tf.Tensor) -> tf.Tensor:
    """Say of each number that it is finite."""
    return tf.constant(True)


def no_mark(_: Position, after: Any) -> tf.Operation:
    """Count nothing."""
    return tf.no_op()


# What is replaced while the step without it is traced.
WITHOUT: dict[str, list[Any]] = {
    "the finite test": [mock.patch.object(tf.math, "is_finite", never)],
    "the beacon of the watchdog": [
        mock.patch.multiple(Position, mark_batch=no_mark, mark_part=no_mark, mark_step=no_mark)
    ],
    "the clock around the input": [mock.patch.object(steps, "is_op_determinism_enabled", return_value=True)],
    "the exact denominator": [mock.patch.object(gradients, "_multiply", lambda gradient, _: gradient)],
    "the request to stop": [],
    "the metrics": [],
}
WHOLE, AGAIN = "everything on", "nothing: everything on, again"


@contextlib.contextmanager
def traced_without(names: list[str]) -> Iterator[None]:
    """Replace what these features are made of."""
    with contextlib.ExitStack() as patches:
        for name in names:
            for patch in WITHOUT[name]:
                patches.enter_context(patch)
        yield


class Never:
    """Stand in for the variable by which a signal stops a run."""

    def read_value(self) -> tf.Tensor:
        """Return a constant."""
        return tf.constant(0.0)


def main(replicas: str, task_args: str) -> None:
    """Measure all kinds of step in turns, and print a table."""
    config = RunConfig(
        task="mnist_cnn",
        task_args=task_args,
        workdir="none",
        replicas=int(replicas),
        strategy="auto" if int(replicas) > 1 else "default",
        global_batch_size=64 * int(replicas),
    )
    workers = cluster.from_tf_config(None)
    life = Lifecycle(workers)
    strategy = startup.start_strategy(config.task, config, workers)
    kinds = {WHOLE: [], AGAIN: [], **{name: [name] for name in WITHOUT}}
    kinds["all of them"] = list(WITHOUT)
    with life.listening() as stop:
        setup = startup.set_up(config.task, config, as_path("none"), workers, *strategy)
        batches = feeding.dataset(setup, startup.train_stream(setup), "step")
        calls = {}
        for kind, left_out in kinds.items():
            step = setup.task.train_step
            step = no_metrics(step) if "the metrics" in left_out else step
            asked: Any = Never() if "the request to stop" in left_out else stop
            with traced_without(left_out):
                calls[kind] = steps.compile_steps(setup.strategy, step, setup.state, batches, training=True, stop=asked)
        found = measure(calls)
    whole = found[WHOLE]
    print(f"{replicas} replica(s), {task_args}: a step of {1e3 * np.median(whole):.3f} ms, in {ROUNDS} rounds")
    print("| without | saves, us | of this step | of a step of 5 ms |\n| --- | --- | --- | --- |")
    for kind, times in found.items():
        if kind != WHOLE:
            saved = 1e6 * (whole - times)
            low, high = bootstrap((saved,), np.median, rng=np.random.default_rng(0)).confidence_interval
            middle = np.median(saved)
            print(
                f"| {kind} | {middle:.1f} ({low:.1f} to {high:.1f}) | {middle / 1e6 / np.median(whole):.2%} | "
                f"{middle / 5e3:.2%} |"
            )


def measure(calls: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the seconds of a step of each kind, float64 `[ROUNDS]`; the order changes from round to round."""
    for call in calls.values():
        call(20)
    began = time.perf_counter()
    calls[AGAIN](100)
    count = max(10, round(WINDOW_SECS / ((time.perf_counter() - began) / 100)))
    found: dict[str, list[float]] = {kind: [] for kind in calls}
    order = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for kind in order.permutation(list(calls)).tolist():
            began = time.perf_counter()
            calls[kind](count)
            found[kind].append((time.perf_counter() - began) / count)
    return {kind: np.array(times) for kind, times in found.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
