"""A task whose second worker is slower: its process sleeps in every step."""

import os
import time

import keras
import numpy as np
import tensorflow as tf

from distloop import State, Task, minimize
from distloop.cluster import from_tf_config


def make_task(config, *, sleep_ms: float = 30.0):
    delay = sleep_ms / 1000 if from_tf_config(os.environ.get("TF_CONFIG")).index == 1 else 0.0

    def build():
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        return State(model=model, optimizer=keras.optimizers.SGD(0.1))

    def sleep():
        time.sleep(delay)
        return np.float32(0)

    def train_step(state, batch):
        def loss(batch):
            slept = tf.numpy_function(sleep, [], tf.float32)
            slept.set_shape([])
            return tf.square(state.model(batch["x"])[:, 0] + slept)

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return Task(build, train_step, lambda: {"x": np.ones([64, 4], np.float32)})
