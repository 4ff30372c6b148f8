"""A task whose workers ask themselves to stop, by a real SIGTERM at a chosen moment: --task=tests.stop_task:make_task.

STOP="step:5:1" sends it during step 5 of worker 1; the moments are step, eval, save and input; worker "all" is each.
STOP_WHOM="supervisor" sends it to the parent process instead, "group" to that one and to all its workers.
"""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from distloop import State
from distloop.cluster import from_tf_config
from tests import toy

_asked = threading.Event()


def _stop_here(moment, step):
    chosen, _, rest = os.environ.get("STOP", "").partition(":")
    if chosen != moment:
        return False
    at, worker = rest.split(":")
    here = from_tf_config(os.environ.get("TF_CONFIG")).index
    if int(step) != int(at) or worker not in ("all", str(here)):
        return False
    parent, whom = os.getppid(), os.environ.get("STOP_WHOM", "self")
    workers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split() if whom == "group" else []
    for pid in {"self": [os.getpid()], "supervisor": [parent], "group": [parent, *map(int, workers)]}[whom]:
        os.kill(pid, signal.SIGTERM)
    _asked.set()
    return True


def _signal_in_graph(moment, step):
    """Return 0 after calling `_stop_here` when the compiled step runs."""
    chosen, _, rest = os.environ.get("STOP", "").partition(":")
    at, _, worker = rest.partition(":")
    asked_by_a_save = chosen == "save" and worker == str(from_tf_config(os.environ.get("TF_CONFIG")).index)

    def call(step):
        if asked_by_a_save and moment == "step" and step == int(at):
            _asked.wait(60)  # a save in the background may take as long as all steps that are left
        if _stop_here(moment, step):
            time.sleep(0.3)  # a slow step: the signal is heard within it
        return np.float32(0)

    return tf.ensure_shape(tf.numpy_function(call, [step], tf.float32), [])


def make_task(config):
    task = toy.make_task(config)
    save = tf.raw_ops.SaveV2

    def save_v2(**arguments):
        _stop_here("save", arguments["prefix"].rpartition("step_")[2].split("/")[0].partition(".")[0])
        return save(**arguments)

    tf.raw_ops.SaveV2 = save_v2

    def build():
        return State(**task.build().parts, noise=keras.random.SeedGenerator(7))

    def train_step(state, batch):
        zero = _signal_in_graph("step", state.step)
        return task.train_step(state, {**batch, "y": batch["y"] + zero})

    def eval_step(state, batch):
        zero = _signal_in_graph("eval", state.step)
        # A stopped evaluation is done again: what it has drawn must be drawn again, too.
        zero += 0.01 * tf.reduce_sum(keras.random.normal([2], seed=state.noise))
        return task.eval_step(
            state,
            {  # pyright: ignore[reportOptionalCall]
                **batch,
                "y": batch["y"] + zero,
            },
        )

    def train_data():
        def slow(row):
            if _stop_here("input", row):
                time.sleep(1)  # so that the step is waiting for it
            return np.float32(0)

        def delayed(example):
            zero = tf.ensure_shape(tf.numpy_function(slow, [example.pop("row")], tf.float32), [])
            return {**example, "y": example["y"] + zero}

        rows = {**toy.DATA, "row": np.arange(len(toy.DATA["y"]))}
        return tf.data.Dataset.from_tensor_slices(rows).map(delayed)

    return dataclasses.replace(task, build=build, train_step=train_step, eval_step=eval_step, train_data=train_data)


def slow(config):
    """Take 20 s a step, from the second on."""
    task = toy.make_task(config)

    def train_step(state, batch):
        def wait(step):
            time.sleep(20 if step else 0)
            return np.float32(0)

        zero = tf.ensure_shape(tf.numpy_function(wait, [state.step], tf.float32), [])
        return task.train_step(state, {**batch, "y": batch["y"] + zero})

    return dataclasses.replace(task, train_step=train_step)


def stops_in_build(config):
    task = toy.make_task(config)

    def build():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    return dataclasses.replace(task, build=build)
