"""The larger tasks of the library: their sizes are those of the papers, and they train on every strategy."""

import time

import tensorflow as tf

from distloop import RunConfig
from distloop.data import make_stream, per_replica_batches
from distloop.task import load_task
from tests import toy


def test_the_null_task_has_the_gradients_that_are_asked_for_and_trains(strategy):
    task = load_task("null", RunConfig(learning_rate=0.1, task_args="gradient_bytes=4000,flops=1e6"))
    state, _, call = toy.compiled(strategy, task)
    assert sum(4 * weight.shape.num_elements() for weight in state.model.trainable_variables) == 4000
    losses = [call(1).sums[0] for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0]


def test_the_batches_of_the_null_task_come_as_late_as_is_asked_for():
    source = load_task("null", RunConfig(task_args="input_ms=20")).train_data()
    stream = make_stream(source, name="train_data", global_batch_size=4, seed=0)
    batches = iter(per_replica_batches(stream, tf.distribute.InputContext(), first_step=0))
    began = time.perf_counter()
    next(batches)  # others are made at the same time, but none before its turn
    first = time.perf_counter()
    for _ in range(9):
        next(batches)
    assert first - began >= 0.02
    assert time.perf_counter() - began >= 10 * 0.02
