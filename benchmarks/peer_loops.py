"""Hand-written loops on tf.distribute, as its guide has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from benchmarks.peer_step import take_mean_loss, training
from benchmarks.timing import Train
from distloop.inputs import untuned
from distloop.startup import Setup


@contextmanager
def one_step_a_call(setup: Setup, dataset: Any) -> Iterator[Train]:
    """Run one step a compiled call: the batch is taken in the graph, and nothing is read back until the last step."""
    replica_step, sums = training(setup, dataset)
    with untuned():
        iterator = iter(dataset)

    def step(iterator: Any) -> None:
        setup.strategy.run(replica_step, args=(next(iterator),))

    compiled: Any = tf.function(step, autograph=False)

    def call(num_steps: int) -> float:
        for _ in range(num_steps):
            compiled(iterator)
        return take_mean_loss(sums)

    yield call


@contextmanager
def many_steps_a_call(setup: Setup, dataset: Any) -> Iterator[Train]:
    """Run up to `steps_per_call` steps in one compiled call, which is traced once for any number of steps."""
    replica_step, sums = training(setup, dataset)
    with untuned():
        iterator = iter(dataset)

    def steps(iterator: Any, num_steps: tf.Tensor) -> None:
        def one(index: tf.Tensor) -> list[tf.Tensor]:
            setup.strategy.run(replica_step, args=(next(iterator),))
            return [index + 1]

        tf.while_loop(lambda index: index < num_steps, one, [tf.constant(0)])

    compiled: Any = tf.function(steps, autograph=False)

    def call(num_steps: int) -> float:
        for begin in range(0, num_steps, setup.config.steps_per_call):
            compiled(iterator, tf.constant(min(setup.config.steps_per_call, num_steps - begin)))
        return take_mean_loss(sums)

    yield call
