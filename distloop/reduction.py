"""The sum over all replicas, which a step asks for once: gradients, metrics, statistics and riders together."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distloop import local_reduction

PACK_BYTES = 4_000_000
_PIECE_BYTES = 1_000_000  # a ring cuts a pack in as many pieces as replicas; those of less are mostly latency


def all_reduce_sum(values: Any, *, bytes_per_pack: int | None = 0) -> Any:
    """Sum a structure of tensors over all replicas. Replica context; every replica gets the same bits.

    The last values leave first, `bytes_per_pack` or a little more at a time: the gradients of the last layers are there
    first, and travel while those of other layers are computed. 0 sends all at once, but for other dtypes and for
    sparse tensors, which travel by themselves. None chooses by the size: all workers alike, and a small model at once.
    Between CPU devices of one process nothing travels.
    """
    flat = tf.nest.flatten(values)
    context = tf.distribute.get_replica_context()
    if local_reduction.fits(context.strategy):
        return tf.nest.pack_sequence_as(values, local_reduction.all_reduce_sum(flat))
    if bytes_per_pack is None:
        bytes_per_pack = _automatic(flat, context.num_replicas_in_sync)
    for places in packs(flat, bytes_per_pack):
        # One call a pack: TensorFlow gives back none of the sums of a call before all of them are there.
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [_gatherable(flat[i]) for i in places])
        for i, total in zip(places, sums, strict=True):
            flat[i] = _as_it_was(total, flat[i].dtype)
    return tf.nest.pack_sequence_as(values, flat)


def _gatherable(value: Any) -> Any:
    """Call the bits of sparse bfloat16 float16: rows are gathered as they are, and TensorFlow refuses bfloat16."""
    return _as_it_was(value, tf.float16) if value.dtype == tf.bfloat16 else value


def _as_it_was(value: Any, dtype: tf.DType) -> Any:
    if not isinstance(value, tf.IndexedSlices) or value.dtype == dtype:
        return value
    return tf.IndexedSlices(tf.bitcast(value.values, dtype), value.indices, value.dense_shape)


def _automatic(values: Sequence[Any], replicas: int) -> int:
    pack = max(PACK_BYTES, _PIECE_BYTES * replicas)
    return pack if sum(map(_bytes, values)) >= 2 * pack else 0


def _bytes(value: Any) -> int:
    return 0 if isinstance(value, tf.IndexedSlices) else value.shape.num_elements() * value.dtype.size


def packs(values: Sequence[Any], bytes_per_pack: int) -> list[list[int]]:
    """Return the places of the values that travel together, in the order in which they leave."""
    packs: list[list[int]] = []
    filling: dict[tf.DType, list[int]] = {}
    for i, value in reversed(list(enumerate(values))):
        if isinstance(value, tf.IndexedSlices):
            packs.append([i])
            continue
        if value.dtype not in filling:
            filling[value.dtype] = []
            packs.append(filling[value.dtype])
        pack = filling[value.dtype]
        pack.append(i)
        if bytes_per_pack and sum(_bytes(values[j]) for j in pack) >= bytes_per_pack:
            del filling[value.dtype]
    return packs
