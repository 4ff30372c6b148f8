"""Steps that leave a part out do all the rest: TensorFlow computes what nothing would use otherwise."""

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import bare_steps, leave_out
from distloop import State, Task, minimize
from tests import toy

RUNS = []


@tf.custom_gradient
def counted(x):
    """Return x; its gradient counts how often it is computed, by an operation that TensorFlow may drop."""

    def count(upstream):
        RUNS.append(1)
        return upstream

    def backward(upstream):
        return tf.ensure_shape(tf.numpy_function(count, [upstream], tf.float32, stateful=False), upstream.shape)

    return tf.identity(x), backward


def build():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, use_bias=False)])
    return State(model=model, optimizer=keras.optimizers.SGD(0.1))


def train_step(state, batch):
    def loss(batch):
        outputs: Any = counted(state.model(batch["x"]))
        return tf.reduce_sum(outputs**2, axis=1)

    return minimize(loss, batch, state.optimizer, state.model.trainable_variables)


TASK = Task(build, train_step, lambda: {"x": np.ones([4, 3], np.float32)})


@pytest.mark.parametrize("parts", [[], [leave_out.update], [leave_out.reduction, leave_out.update]])
def test_gradients_are_computed_in_each_step_though_none_is_applied(parts):
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part())
        state, _, call = toy.compiled(tf.distribute.get_strategy(), TASK)
    before = state.model.weights[0].numpy()
    RUNS.clear()
    call(5)
    assert len(RUNS) == 5
    assert np.array_equal(state.model.weights[0].numpy(), before) == bool(parts)
    assert int(state.optimizer.iterations.numpy()) == 5


def test_what_is_needed_is_0_but_for_nan():
    rows = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([0, 1]), tf.constant([5, 3]))
    assert bare_steps.needed([tf.constant([[3.0]]), rows]) == 0
    assert bare_steps.needed([tf.constant([np.nan]), rows]) == 1
