"""Broken and odd tasks for the command line: --task=tests.own_task:<name>."""

import dataclasses

import numpy as np
import tensorflow as tf

from distloop import mean
from tests import toy


def good(config):
    return toy.make_task(config)


def scalar_loss(config):
    from distloop import minimize

    def step(state, batch):
        return minimize(lambda b: tf.reduce_mean(b["x"]), batch, state.optimizer, state.model.trainable_variables)

    return dataclasses.replace(toy.make_task(config), train_step=step)


def no_metric(config):
    return dataclasses.replace(toy.make_task(config), train_step=lambda state, batch: {"loss": tf.constant(1.0)})


def no_data(config):
    return dataclasses.replace(toy.make_task(config), train_data=lambda: {"x": np.zeros([0, 3]), "y": np.zeros([0])})


def no_split(config):
    from distloop import load_tfds

    return dataclasses.replace(
        toy.make_task(config), train_data=lambda: load_tfds("mnist", "validation", config.data_dir)
    )


def other_data_on_worker_1(config):
    import os

    from distloop.cluster import from_tf_config

    extra = from_tf_config(os.environ.get("TF_CONFIG")).index
    data = {name: np.concatenate([array, array[:extra]]) for name, array in toy.DATA.items()}
    return dataclasses.replace(toy.make_task(config), train_data=lambda: data)


def other_eval_data_on_worker_1(config):
    import os

    from distloop.cluster import from_tf_config

    rows = 10 - 4 * from_tf_config(os.environ.get("TF_CONFIG")).index
    data = {name: array[:rows] for name, array in toy.DATA.items()}
    return dataclasses.replace(toy.make_task(config), eval_data=lambda: data)


def diverges(config):
    from distloop import minimize

    def step(state, batch):
        def loss(b):
            return tf.where(state.step >= 5, np.float32("nan"), 1.0) * tf.square(state.model(b["x"])[:, 0])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return dataclasses.replace(toy.make_task(config), train_step=step)


def dies_on_worker_1(config):
    import os
    import signal

    from distloop.cluster import from_tf_config

    task = toy.make_task(config)

    def build():
        if from_tf_config(os.environ.get("TF_CONFIG")).index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task.build()

    return dataclasses.replace(task, build=build)


def fails_on_worker_1(config):
    import os

    from distloop.cluster import from_tf_config

    task = toy.make_task(config)
    index = from_tf_config(os.environ.get("TF_CONFIG")).index

    def train_step(state, batch):
        def fail(step):
            if index == 1 and step == 4:
                raise OSError("no more disks")
            return np.float32(0)

        zero = tf.ensure_shape(tf.numpy_function(fail, [state.step], tf.float32), [])
        return task.train_step(state, {**batch, "y": batch["y"] + zero})

    return dataclasses.replace(task, train_step=train_step)


def fails_at_step_4(config):
    task = toy.make_task(config)

    def fail(step):
        if step == 4:
            raise OSError("no more disks")
        return np.float32(0)

    def train_step(state, batch):
        zero = tf.ensure_shape(tf.numpy_function(fail, [state.step], tf.float32), [])
        return task.train_step(state, {**batch, "y": batch["y"] + zero})

    return dataclasses.replace(task, train_step=train_step)


def hangs_in_build(config):
    import time

    def build():
        print("building", flush=True)
        time.sleep(600)

    return dataclasses.replace(toy.make_task(config), build=build)


def counts_examples(config):
    """Train on 1,000 numbered examples; each step says the sums of their numbers and of the squares of these."""
    from distloop import minimize

    data = {
        "id": np.arange(1000, dtype=np.int64),
        **{k: np.resize(v, [1000, *v.shape[1:]]) for k, v in toy.DATA.items()},
    }

    def step(state, batch):
        def loss(b):
            return tf.square(state.model(b["x"], training=True)[:, 0] - b["y"])

        number = tf.cast(batch["id"], tf.float32)
        sums = {"number": mean(number, batch["weight"]), "square": mean(number**2, batch["weight"])}
        return minimize(loss, batch, state.optimizer, state.model.trainable_variables) | sums

    return dataclasses.replace(toy.make_task(config), train_step=step, train_data=lambda: data)
