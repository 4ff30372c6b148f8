"""The sum over all replicas, which a step asks for once: gradients, metrics, statistics and riders together."""

from typing import Any

import tensorflow as tf

from distloop import local_reduction


def all_reduce_sum(values: Any) -> Any:
    """Sum a structure of tensors over all replicas. Replica context; every replica gets the same bits."""
    context = tf.distribute.get_replica_context()
    if local_reduction.fits(context.strategy):
        return tf.nest.pack_sequence_as(values, local_reduction.all_reduce_sum(tf.nest.flatten(values)))
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)
