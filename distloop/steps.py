"""Compiled steps: `steps_per_call` steps in one call, traced once. `strategy.run` appears only here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from distloop import metrics as metrics_lib
from distloop.task import Batch, State, StepFn


@dataclass(frozen=True)
class CompiledSteps:
    """Run a step many times in one call. `names` are the metrics of a step, in the order of a row."""

    names: tuple[str, ...]
    _call: Any
    _iterator: Iterator[Batch]

    def __call__(self, num_steps: int) -> np.ndarray:
        """Run `num_steps` steps; return float32 `[num_steps, metrics, 2]`: total and count, over all replicas.

        Every worker must make the same calls. Waits for the result (device sync).
        """
        return self._call(self._iterator, tf.constant(num_steps)).numpy()


def compile_steps(
    strategy: tf.distribute.Strategy, step_fn: StepFn, state: State, dataset: Any, *, training: bool
) -> CompiledSteps:
    """Trace `step_fn(state, batch)` over a distributed, endless `dataset`; `training` advances `state.step`.

    Cross-replica context. Raises what the user's step raises, as it is, before anything runs.
    """
    iterator = iter(dataset)
    names: list[str] = []

    def replica_step(batch: Batch) -> tf.Tensor:
        metrics = metrics_lib.check(step_fn(state, batch))
        names[:] = metrics
        return metrics_lib.pack(list(metrics_lib.reduce(metrics).values()))

    def call(iterator: Iterator[Batch], num_steps: tf.Tensor) -> tf.Tensor:
        def one_step(index: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            packed = strategy.run(replica_step, args=(next(iterator),))
            if training:
                state.step.assign_add(1)
            # Every replica holds the same sums; the first local one needs no communication.
            return index + 1, rows.write(index, strategy.experimental_local_results(packed)[0])

        rows = tf.TensorArray(tf.float32, size=num_steps)
        _, rows = tf.while_loop(lambda index, _: index < num_steps, one_step, (0, rows))
        return rows.stack()

    # Without AutoGraph, a user's error keeps its type and points at the user's line. This costs `if tensor:` in a step.
    compiled: Any = tf.function(call, autograph=False)
    compiled.get_concrete_function(iterator, tf.TensorSpec([], tf.int32))
    return CompiledSteps(tuple(names), compiled, iterator)
