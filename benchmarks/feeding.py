"""What a measured step reads: its batch held on the device, the same batch from the host, or the real pipeline."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, final

import tensorflow as tf

from distloop import inputs, startup
from distloop.data import Stream, endless, per_replica_batches
from distloop.task import Batch

ENDLESS = 2**62  # examples


@final
class Resident:
    """Give the same per-replica batches, which lie on their devices, in every step: the input costs nothing."""

    def __init__(self, strategy: tf.distribute.Strategy, batches: tf.data.Dataset) -> None:
        is_default = strategy is tf.distribute.get_strategy()
        devices = [None] if is_default else strategy.extended.worker_devices
        held = []
        for device, batch in zip(devices, batches, strict=False):
            with tf.device(device):
                held.append(tf.nest.map_structure(tf.identity, batch))

        def batch_of(context: tf.distribute.experimental.ValueContext) -> Batch:
            return held[context.replica_id_in_sync_group % len(held)]  # the replicas of a worker follow each other

        self._values = strategy.experimental_distribute_values_from_function(batch_of)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._values


def dataset(setup: startup.Setup, stream: Stream, mode: str) -> Any:
    """Return what the steps of `mode` read, for `compile_steps`."""
    strategy = setup.strategy
    if mode == "input":
        return inputs.distributed(strategy, stream, first_step=0)
    if mode == "h2d":
        return (
            inputs.together(strategy, partial(_one_step, stream, together=True))
            if inputs.on_the_host(strategy)
            else for_peers(setup, stream)
        )
    context = tf.distribute.InputContext(setup.workers.num_workers, setup.workers.index, strategy.num_replicas_in_sync)
    return Resident(strategy, per_replica_batches(stream, context, first_step=0))


def for_peers(setup: startup.Setup, stream: Stream) -> Any:
    """Return the batches of one step, again and again, from the host, as the guide of `tf.distribute` has it."""
    return setup.strategy.distribute_datasets_from_function(partial(_one_step, stream, together=False))


def _one_step(stream: Stream, context: tf.distribute.InputContext, *, together: bool) -> tf.data.Dataset:
    batches = per_replica_batches(stream, context, first_step=0, together=together)
    # As many as a worker has replicas: so each gets one of its own again and again.
    local = context.num_replicas_in_sync // context.num_input_pipelines
    return endless(batches.take(1 if together else local).cache().repeat())


def without_epochs(stream: Stream) -> Stream:
    """Return the stream as the loop should see it, so that no call is cut at the end of an epoch."""
    return replace(stream, num_examples=ENDLESS)
