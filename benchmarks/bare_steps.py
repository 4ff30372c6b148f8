"""Steps that do one thing only: read a batch, or exchange gradients."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from distloop import reduction
from distloop.errors import UsageError
from distloop.metrics import Metric, divide, mean
from distloop.scopes import current_step
from distloop.task import Batch, State


def read(_: State, batch: Batch) -> dict[str, Metric]:
    """Wait for every feature of the batch."""
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        return {"weight": mean(tf.identity(batch["weight"]), tf.ones_like(batch["weight"]))}


def needed(tensors: Any) -> tf.Tensor:
    """Return 0, float32, by way of an entry of each tensor, so that TensorFlow computes all of them.

    A control dependency would not do: Grappler drops an operation of whose result nothing is used. 1 if one is NaN.
    """
    found = [part.values if isinstance(part, tf.IndexedSlices) else part for part in tensors]
    entries = [tf.cast(tf.reshape(part, [-1])[0], tf.float32) for part in found]
    return tf.cast(tf.math.is_nan(tf.add_n(entries)), tf.float32)


def exchange(rows: Sequence[int | None], state: State, batch: Batch) -> dict[str, Metric]:
    """Sum what has the shapes of the gradients over all replicas, as `minimize` does: in the one reduction of the step.

    The variables stand for their gradients, so many `rows` of one where that is sparse: they lie on the device, and
    TensorFlow cannot know their sum.
    """
    step: Any = current_step()
    carried = tf.concat([[tf.reduce_sum(batch["weight"])], step.riders], axis=0)
    variables = trainable_variables(state)
    if len(rows) != len(variables):
        raise UsageError(
            f"the step has gradients of {len(rows)} of {len(variables)} variables; comm needs all of them."
        )
    gradients = [_like_gradient(variable, count) for variable, count in zip(variables, rows, strict=True)]
    gradients, carried = reduction.all_reduce_sum((gradients, carried))
    step.reduced_riders = carried[1:]
    return {"weight": Metric((carried[0] + needed(gradients), tf.constant(1.0)), divide, reduced=True)}


def _like_gradient(variable: keras.Variable, rows: int | None) -> Any:
    if rows is None:
        return tf.identity(variable.value)
    indices = tf.range(rows, dtype=tf.int32) % variable.shape[0]
    return tf.IndexedSlices(
        tf.gather(variable.value, indices), indices, tf.constant([int(size) for size in variable.shape])
    )


def trainable_variables(state: State) -> list[Any]:
    """Return what the optimizers of the state update, in their order."""
    optimizers = [part for part in state.parts.values() if isinstance(part, keras.optimizers.Optimizer)]
    return [variable for optimizer in optimizers for variable in optimizer._trainable_variables]
