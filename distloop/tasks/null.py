"""A model that is nothing but its costs: gradients of so many bytes, so many FLOPs, batches that come so late.

    python -m launch.train --task=null --task_args=gradient_bytes=4000000,flops=1e9,input_ms=5 --workdir=runs/null

It measures what distloop itself costs, and plants delays that a benchmark must find.
"""

import threading
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distloop import Metric, Pipeline, RunConfig, State, Task, minimize

Batch = dict[str, tf.Tensor]
_PRODUCTS = 8


class Costs(keras.layers.Layer):
    """Return the sum of `weights` float32 weights, over its root, less x `[examples]`, after products of `flops`."""

    def __init__(self, weights: int, flops: float) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=[weights], initializer="zeros", name="kernel")
        self.width = round((flops / (2 * _PRODUCTS)) ** (1 / 3))
        self.build((None,))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return `[examples]`."""
        if self.width:
            # Entries of 1 / width in all products, made of the data so that nothing can be computed beforehand.
            product = matrix = tf.fill([self.width, self.width], x[0] / self.width)
            for _ in range(_PRODUCTS):
                product = matrix @ product
            x = x * tf.stop_gradient(tf.reduce_mean(product) * self.width)
        return tf.reduce_sum(self.kernel) / self.kernel.shape[0] ** 0.5 - x


def make_task(
    config: RunConfig,
    *,
    gradient_bytes: int = 4_000_000,
    flops: float = 0.0,
    input_ms: float = 0.0,
    examples: int = 4096,
) -> Task:
    """Fit `gradient_bytes` of float32 weights to a constant by SGD at `config.learning_rate`.

    Each replica computes `flops` a step in 8 products of square matrices, whatever its batch. Its batches come one
    after the other, each `input_ms` milliseconds later.
    """
    in_turn = threading.Lock()

    def sleep() -> np.int32:
        with in_turn:
            time.sleep(input_ms / 1000)
        return np.int32(0)

    def wait(batch: Batch) -> Batch:
        with tf.control_dependencies([tf.numpy_function(sleep, [], tf.int32)]):
            return {name: tf.identity(value) for name, value in batch.items()}

    def build() -> State:
        return State(model=Costs(gradient_bytes // 4, flops), optimizer=keras.optimizers.SGD(config.learning_rate))

    def train_step(state: State, batch: Batch) -> dict[str, Metric]:
        def loss(batch: Batch) -> Any:
            return tf.square(tf.cast(state.model(batch["x"]), tf.float32))

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def train_data() -> Pipeline:
        return Pipeline({"x": np.ones([examples], np.float32)}, map_batch=wait if input_ms else None)

    return Task(build, train_step, train_data)
