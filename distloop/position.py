"""Where a compiled call of many steps is: a counter that the steps move, for another thread to read.

A step counts up when it begins to wait for its batch and when it has it; with several workers, each replica counts up,
too, when it has computed its part of the step and waits for the other workers. So the number says it all.
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
    """Count what the steps of one compiled function reach; `steps` are those of the calls that have returned."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        self._parts = len(strategy.extended.worker_devices) if several else 0
        with tf.device("CPU:0"):  # reading it must wait for no accelerator
            self._marks = tf.Variable(tf.constant(0, tf.int64), trainable=False)
        self.steps = 0

    def mark(self, after: Sequence[tf.Tensor] = ()) -> tf.Operation:
        """Count up once the tensors `after` are there. For tracing."""
        with tf.control_dependencies(after), tf.device("CPU:0"):
            return self._marks.assign_add(1, read_value=False)

    def mark_part(self, after: Sequence[tf.Tensor]) -> None:
        """Count up once a replica has done its part. Replica context; one worker waits for no other."""
        if self._parts:
            self.mark(after)

    def read(self) -> Where:
        """Return where the calls are. Any thread may ask, at any time."""
        steps, marks = self.steps, int(self._marks.numpy())
        begun, reached = divmod(marks, self._parts + 2)
        if reached == 0 and begun > steps:  # the last mark of a step is not its end
            return Where(begun - 1, in_input=False, waits=self._parts > 0, marks=marks)
        return Where(begun, in_input=reached == 1, waits=False, marks=marks)
