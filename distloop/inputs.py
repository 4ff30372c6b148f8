"""From a stream of batches to what a compiled step reads: the batches of all local replicas, one element a step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from distloop.data import Stream, per_replica_batches, untuned_options
from distloop.task import Batch


def distributed(strategy: tf.distribute.Strategy, stream: Stream, *, first_step: int) -> Any:
    """Return the endless dataset of a stream's batches from `first_step` on, for all local replicas."""
    if on_the_host(strategy):
        return together(
            strategy, lambda context: per_replica_batches(stream, context, first_step=first_step, together=True)
        )
    return strategy.distribute_datasets_from_function(
        lambda context: per_replica_batches(stream, context, first_step=first_step)
    )


def on_the_host(strategy: tf.distribute.Strategy) -> bool:
    """Return whether all local replicas of a strategy that distributes are CPU devices."""
    is_default = strategy is tf.distribute.get_strategy()
    return not is_default and all("CPU" in device for device in strategy.extended.worker_devices)


def together(
    strategy: tf.distribute.Strategy, make: Callable[[tf.distribute.InputContext], tf.data.Dataset]
) -> tf.data.Dataset:
    """Return the plain dataset that `make` makes for this worker: tuples, a batch for each local replica.

    One iterator, where replicas read the memory of the host anyway: `tf.distribute` fetches for each device by threads,
    buffers and remote calls of its own, 0.5 ms a step on two CPUs.
    """
    made: list[tf.data.Dataset] = []
    strategy.distribute_datasets_from_function(lambda context: made.append(make(context)) or made[-1])
    return made[0]


def next_batch(strategy: tf.distribute.Strategy, iterator: Iterator[Any]) -> Batch:
    """Return the next step's batch of each local replica, from an iterator over what `distributed` returned.

    The iterator must be an argument of the compiled function. One that the function captures lives until Python ends,
    and its end then waits for ever for a pipeline that calls a Python function.
    """
    batches = next(iterator)
    if not isinstance(batches, tuple):
        return batches
    return strategy.experimental_distribute_values_from_function(
        lambda context: batches[context.replica_id_in_sync_group % len(batches)]  # a worker's follow each other
    )


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Let the iterators over several devices that are made here have no tuning thread.

    tf.data's thread sleeps for up to a minute and is not woken when the iterator ends (TensorFlow 2.21), so that a run
    on several replicas would end as late; `tf.distribute` offers no option for its iterators. The function is private.
    """
    original = multi_device_iterator_ops._create_device_dataset

    def create(*arguments: Any) -> Any:
        return original(*arguments).with_options(untuned_options())

    multi_device_iterator_ops._create_device_dataset = create
    try:
        yield
    finally:
        multi_device_iterator_ops._create_device_dataset = original
