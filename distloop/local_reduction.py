"""The sum over replicas that are CPU devices of one process: additions in shared memory, in place of a collective.

TensorFlow's collective hands every tensor to threads that meet and wait, which takes longer than a small step.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

_SMALL = 2**14  # entries; to copy them into one vector costs less than an exchange of their own
_NAME = "sum_of_replicas"  # by which a graph shows what replicas exchange


def fits(strategy: tf.distribute.Strategy) -> bool:
    """Return whether all replicas of `strategy` are CPU devices of this process, and several."""
    if not isinstance(strategy, tf.distribute.MirroredStrategy) or strategy.num_replicas_in_sync == 1:
        return False
    extended: Any = strategy.extended
    if extended._cross_device_ops is not extended._collective_ops:  # private; a user's own, which the preflight tests
        return False
    return all("CPU" in device for device in extended.worker_devices)


def all_reduce_sum(values: Sequence[Any]) -> list[Any]:
    """Sum tensors and IndexedSlices over all replicas. Replica context; every replica gets the same bits.

    What is small travels as one vector. Large tensors travel by themselves, so that there is no second copy of them;
    the devices share these additions, and read the same sums.
    """
    small = [i for i, value in enumerate(values) if _is_small(value)]
    large = [i for i in range(len(values)) if i not in small]
    packed = tf.concat([tf.zeros([0]), *(tf.reshape(values[i], [-1]) for i in small)], 0)
    context = tf.distribute.get_replica_context()
    packed, *sums = context.merge_call(_add, args=(packed, *(values[i] for i in large)))
    parts = tf.split(packed, [values[i].shape.num_elements() for i in small]) if small else []
    # What all replicas share would count as one value where tf.distribute looks for one of each.
    found = {i: tf.identity(total) for i, total in zip(large, sums, strict=True)}
    found |= {i: tf.reshape(part, values[i].shape) for i, part in zip(small, parts, strict=True)}
    return [found[i] for i in range(len(values))]


def _is_small(value: Any) -> bool:
    return (
        isinstance(value, tf.Tensor) and value.dtype == tf.float32 and (value.shape.num_elements() or _SMALL) < _SMALL
    )


def _add(strategy: tf.distribute.Strategy, *values: Any) -> list[Any]:
    """Return the sum of each per-replica value, on one device after the other. Cross-replica context."""
    sums = []
    for i, value in enumerate(values):
        parts = strategy.experimental_local_results(value)
        with tf.device(strategy.extended.worker_devices[i % len(parts)]):
            if isinstance(parts[0], tf.IndexedSlices):
                rows, indices = (
                    tf.concat(columns, 0, name=_NAME)
                    for columns in ([p.values for p in parts], [p.indices for p in parts])
                )
                sums.append(tf.IndexedSlices(rows, indices, parts[0].dense_shape))
            else:
                sums.append(tf.add_n(parts, name=_NAME))
    return sums
