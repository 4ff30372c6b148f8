"""Orbit's `Controller` with a `StandardTrainer`: https://github.com/tensorflow/models/tree/master/orbit."""

import contextlib
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.peer_step import training
from benchmarks.timing import Train
from distloop.startup import Setup


@contextmanager
def controller(setup: Setup, dataset: Any) -> Iterator[Train]:
    """Train in inner loops of `steps_per_call` steps, each one compiled call; writes neither checkpoint nor summary."""
    orbit: Any = importlib.import_module("orbit")  # which not everyone has
    replica_step, sums = training(setup, dataset)
    losses = np.zeros(2)

    class Trainer(orbit.StandardTrainer):
        def train_loop_begin(self) -> None:
            sums.assign(tf.zeros_like(sums))

        @tf.autograph.experimental.do_not_convert
        def train_step(self, iterator: Any) -> None:
            setup.strategy.run(replica_step, args=(next(iterator),))
            setup.state.step.assign_add(1)

        def train_loop_end(self) -> dict[str, tf.Tensor]:
            total, count, *_ = sums.numpy()
            losses[:] += total, count
            return {"loss": total / count}

    # Not the optimizer's count, which does not move when a loss scale skips a step.
    loop = orbit.Controller(
        global_step=setup.state.step,
        trainer=Trainer(dataset),
        strategy=setup.strategy,
        steps_per_loop=setup.config.steps_per_call,
    )

    def call(num_steps: int) -> float:
        losses[:] = 0.0
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line a loop
            loop.train(int(setup.state.step.numpy()) + num_steps)
        return losses[0] / losses[1]

    yield call
