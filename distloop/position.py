"""Where a compiled call of many steps is: counters that the steps move, for another thread to read.

They count the batches that have come, the replicas of this worker that have computed their part of a step and wait for
the other workers, and the steps that are complete. A step's batch comes while the step before it is computed.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import tensorflow as tf


class Where(NamedTuple):
    """Say where the calls are. `marks` moves with all that they do."""

    steps: int  # complete, in all calls
    in_input: bool  # waits for a batch
    waits: bool  # has done its part, and waits for other workers
    marks: int


@final
class Position:
    """Count what the steps of one compiled function reach."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        self._replicas = len(strategy.extended.worker_devices) if several else 0  # that wait for other workers
        with tf.device("CPU:0"):  # reading them must wait for no accelerator
            self._batches, self._parts, self._steps = (
                tf.Variable(tf.constant(0, tf.int64), trainable=False) for _ in range(3)
            )

    def mark_batch(self, after: Sequence[tf.Tensor]) -> tf.Operation:
        """Count a batch once the tensors `after` are there. For tracing, as all marks."""
        return _count(self._batches, after)

    def mark_part(self, after: Sequence[tf.Tensor]) -> None:
        """Count a replica that has done its part. Replica context; one worker waits for no other."""
        if self._replicas:
            _count(self._parts, after)

    def mark_step(self, after: Sequence[tf.Tensor]) -> tf.Operation:
        """Count a step, of which an update may still be under way."""
        return _count(self._steps, after)

    def read(self) -> Where:
        """Return where the calls are. Any thread may ask, at any time."""
        steps, parts, batches = (int(count.numpy()) for count in (self._steps, self._parts, self._batches))
        return Where(
            steps,
            in_input=batches <= steps,
            waits=0 < self._replicas <= parts - self._replicas * steps and batches > steps,
            marks=steps + parts + batches,
        )


def _count(counter: tf.Variable, after: Sequence[tf.Tensor]) -> tf.Operation:
    with tf.control_dependencies(after), tf.device("CPU:0"):
        return counter.assign_add(1, read_value=False)
