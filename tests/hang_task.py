"""A task of which one worker hangs, once, or that is slow but well: --task=tests.hang_task:make_task.

HANGS="kind:step:rank:marker ..." names how, from which training step on, and which worker; the file `marker` says that
it has hung; then the next is meant. Kinds are `busy` and `lock` (in the step), `input`, `eval` and `trace`; `slow` is
all of them a bit.
"""

import dataclasses
import os
import threading
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from distloop.cluster import from_tf_config
from tests import toy

HANGS = "HANGS"


def hang_in_my_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hang_in_my_loop():
    while True:
        pass


def hang_asleep():
    time.sleep(3600)


def here(moment, step, batch=0):
    """Hang, or be slow, if it is the moment."""
    chosen = (one.split(":") for one in os.environ.get(HANGS, "").split())
    kind, at, rank, marker = next((one for one in chosen if not Path(one[-1]).exists()), ("", "0", "0", ""))
    if kind == "slow":
        # The first compilation, ten times the usual time of a step, and an evaluation longer than any limit.
        time.sleep({"trace": 5, "step": 1 if 6 <= step <= 8 else 0.1, "eval": 0.7}.get(moment, 0))
        return
    wanted = kind if kind in ("input", "eval", "trace") else "step"
    is_me = int(rank) == from_tf_config(os.environ.get("TF_CONFIG")).index
    if kind and moment == wanted and is_me and step >= int(at):
        Path(marker).touch()
        {"busy": hang_in_my_loop, "lock": hang_in_my_lock}.get(kind, hang_asleep)()


def make_task(config):
    task = toy.make_task(config)

    def passing(moment, step, tensor):
        def call(step, value):
            here(moment, step)
            return value

        return tf.ensure_shape(tf.numpy_function(call, [step, tensor], tensor.dtype), tensor.shape)

    def train_step(state, batch):
        here("trace", 1)
        return task.train_step(state, {**batch, "y": passing("step", state.step + 1, batch["y"])})

    def eval_step(state, batch):
        late = {**batch, "y": passing("eval", state.step, batch["y"])}
        return task.eval_step(state, late)  # pyright: ignore[reportOptionalCall]

    def train_data():
        rows = {**toy.DATA, "row": np.arange(len(toy.DATA["y"]))}
        return tf.data.Dataset.from_tensor_slices(rows).map(
            lambda row: {"x": row["x"], "y": passing("input", row["row"], row["y"])}
        )

    return dataclasses.replace(task, train_step=train_step, eval_step=eval_step, train_data=train_data)
