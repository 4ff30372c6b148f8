"""Optimizer slots shared out over the replicas: stage 1 of ZeRO (https://arxiv.org/abs/1910.02054).

A variable is flattened, padded with zeros to a multiple of N and cut into N pieces. Replica r holds the slots of the
r-th piece only, and updates it by Keras's own rule from the gradient that all hold; then all gather the new weights.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, final

import keras
import numpy as np
import tensorflow as tf

from distloop import fused, reduction
from distloop.errors import UsageError

# Keras's rules that move each entry by its own gradient, weight and slots, and have no variables but slots.
_RULES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Lion", "Ftrl")
_ANONYMOUS = "cd2c89b7-88b7-44c8-ad83-06c2a9158347"  # ResourceHandle::ANONYMOUS_NAME of TensorFlow's C++ code


@final
class ShardedSlot:
    """Stand for a slot as if every replica held the whole of it: a checkpoint does not show how many there were.

    Cross-replica context. With several workers, each method but `assign` is a collective: every worker calls it.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        """Make it of zeros, in the strategy's scope."""
        self.shape = tf.TensorShape(shape)
        self.dtype = tf.as_dtype(dtype)
        self._strategy = tf.distribute.get_strategy()
        self.pieces = tf.Variable(
            tf.zeros([_length(self.shape.num_elements(), self._strategy.num_replicas_in_sync)], self.dtype),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,  # each replica has a value of its own
        )

    @property
    def local_pieces(self) -> Sequence[tf.Variable]:
        """Return what this process holds: one piece, `[length]`, for each of its replicas."""
        return self._strategy.experimental_local_results(self.pieces)

    def assign(self, value: Any) -> None:
        """Give each local replica its piece of `value`, which has the shape of the whole."""
        value = tf.convert_to_tensor(value)
        own = self._on_each_replica(lambda context: _piece(value, context.replica_id_in_sync_group, self._strategy))
        for variable, piece in zip(self.local_pieces, self._strategy.experimental_local_results(own), strict=True):
            variable.assign(piece.numpy().copy())  # a slice would keep the whole in memory

    def numpy(self) -> np.ndarray:
        """Return the whole."""
        return self._gather(self.local_pieces)[: self.shape.num_elements()].reshape(self.shape.as_list())

    def is_finite(self) -> bool:
        """Return whether no replica holds an infinity or a NaN."""
        verdicts = [tf.reduce_all(tf.math.is_finite(piece), keepdims=True) for piece in self.local_pieces]
        return bool(self._gather([tf.cast(verdict, tf.int32) for verdict in verdicts]).all())

    def _gather(self, local: Sequence[Any]) -> np.ndarray:
        if _is_one_process(self._strategy):
            return np.concatenate([part.numpy() for part in local])
        parts = iter(local)
        everywhere = self._on_each_replica(lambda _: _gatherable(tf.convert_to_tensor(next(parts))))
        return tf.bitcast(_gathering(self._strategy)(everywhere), local[0].dtype).numpy()

    def _on_each_replica(self, value_of: Any) -> Any:
        return self._strategy.experimental_distribute_values_from_function(value_of)


def shard(optimizer: keras.optimizers.Optimizer) -> dict[int, ShardedSlot]:
    """Share the slots of a built optimizer out over the replicas; return them by id of their Keras variables.

    In the strategy's scope; on one replica it only checks. Names, shapes and values stay as they are.
    Raises UsageError on an optimizer whose update of an entry depends on others.
    """
    if type(optimizer).__module__.partition(".")[0] != "keras" or type(optimizer).__name__ not in _RULES:
        raise UsageError(
            f"shard_optimizer got a {type(optimizer).__name__}, whose update of one weight may depend on others; "
            f"expected one of Keras's {', '.join(_RULES)}: use one of these, or drop --shard_optimizer."
        )
    strategy, sharded = tf.distribute.get_strategy(), {}
    if strategy.num_replicas_in_sync == 1:
        return sharded
    if isinstance(strategy, tf.distribute.TPUStrategy):
        raise UsageError("shard_optimizer is on, but strategy is tpu, for which it was not made; drop one of the two.")
    for slot in optimizer.variables:
        if slot is not optimizer._iterations and slot is not optimizer._learning_rate:
            sharded[id(slot)] = ShardedSlot(slot.shape, slot.dtype)
            sharded[id(slot)].assign(slot.numpy())
            slot._value = sharded[id(slot)].pieces  # its shape stays that of the whole
    # Keras goes on around it: it checks the variables before, keeps constraints and counts iterations after.
    hooked: Any = optimizer
    hooked._backend_apply_gradients = partial(_update, optimizer)
    return sharded


def _update(
    optimizer: Any, gradients: Sequence[tf.Tensor | tf.IndexedSlices], variables: Sequence[keras.Variable]
) -> None:
    """Update `variables` by reduced gradients, in place of Keras's method of this name. Replica context."""
    context, rate = tf.distribute.get_replica_context(), optimizer.learning_rate
    replica, strategy = context.replica_id_in_sync_group, context.strategy
    pieces = []
    for gradient, variable in zip(gradients, variables, strict=True):
        piece: Any = _Piece(optimizer._var_key(variable), _piece(variable.value, replica, strategy))
        if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable.value):
            decay, current_rate = (tf.cast(factor, piece.dtype) for factor in (optimizer.weight_decay, rate))
            piece.assign_sub(piece.value * decay * current_rate)
        # A sparse gradient becomes dense, as in most of Keras's rules.
        dense = _piece(tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape), replica, strategy)
        if not fused.update(optimizer, dense, piece):
            optimizer.update_step(dense, piece, rate)
        pieces.append(piece.value)
    gather = _gather_locally if _is_one_process(strategy) else _gather_packed
    for variable, whole in zip(variables, gather(pieces), strict=True):
        variable.assign(tf.reshape(whole[: variable.shape.num_elements()], variable.shape))


@final
class _Piece:
    """Stand for a variable in an update: Keras's rules read and assign a tensor, kernels write in place."""

    def __init__(self, key: str, value: tf.Tensor) -> None:
        self._unique_id = key  # by which the optimizer finds the slots
        self._handle: tf.Tensor | None = None
        self._value = value
        self.dtype = value.dtype
        self.shape = value.shape

    @property
    def handle(self) -> tf.Tensor:
        """Return a variable that is made of the value in each step, and gone after it."""
        handle: Any = tf.raw_ops.VarHandleOp(dtype=self.dtype, shape=self.shape, shared_name=_ANONYMOUS)
        tf.raw_ops.AssignVariableOp(resource=handle, value=self._value)
        self._handle = handle
        return handle

    @property
    def value(self) -> tf.Tensor:
        """Return what it holds now."""
        if self._handle is None:
            return self._value
        return tf.raw_ops.ReadVariableOp(resource=self._handle, dtype=self.dtype)

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> tf.Tensor:
        return self._value

    def assign(self, value: tf.Tensor) -> None:
        self._value = value

    def assign_add(self, value: tf.Tensor) -> None:
        self._value = self._value + value

    def assign_sub(self, value: tf.Tensor) -> None:
        self._value = self._value - value


def _length(size: int, replicas: int) -> int:
    return -(-size // replicas)


def _piece(value: Any, replica: Any, strategy: tf.distribute.Strategy) -> tf.Tensor:
    """Return the piece of a dense value that belongs to a replica, `[length]`."""
    flat, size = tf.reshape(value, [-1]), value.shape.num_elements()
    length = _length(size, strategy.num_replicas_in_sync)
    padding = length * strategy.num_replicas_in_sync - size
    flat = tf.pad(flat, [[0, padding]]) if padding else flat
    return tf.slice(flat, [tf.cast(replica, tf.int64) * length], [length])


def _gather_locally(pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return for each piece of this replica those of all replicas, end to end, if all are in this process."""

    def join(strategy: tf.distribute.Strategy, *pieces: Any) -> list[tf.Tensor]:
        return [tf.concat(strategy.experimental_local_results(piece), 0) for piece in pieces]

    return tf.distribute.get_replica_context().merge_call(join, args=tuple(pieces))


def _gather_packed(pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return for each piece of this replica those of all replicas, end to end: one collective for a small model."""
    context, wholes = tf.distribute.get_replica_context(), list(pieces)
    # In packs as gradients go: all at once would be in memory three times.
    for places in reduction.packs(pieces, reduction.PACK_BYTES):
        packed, lengths = tf.concat([pieces[i] for i in places], 0), [tf.size(pieces[i]) for i in places]
        gathered = tf.bitcast(context.merge_call(_all_gather, args=(_gatherable(packed),)), packed.dtype)
        rows = tf.reshape(gathered, [context.num_replicas_in_sync, -1])
        for i, columns in zip(places, tf.split(rows, lengths, axis=1), strict=True):
            wholes[i] = tf.reshape(columns, [-1])
    return wholes


def _all_gather(strategy: tf.distribute.Strategy, packed: Any) -> Any:
    """Gather vectors of one length. ReplicaContext.all_gather would gather their lengths first, and copy four times.

    So does `tf.distribute` itself for sparse gradients; these names are private, and a test on two processes pins them.
    """
    extended: Any = strategy.extended
    gathered = [
        launcher._all_gather(local, extended._communication_options)
        for launcher, local in zip(
            extended._cross_device_ops._launchers, strategy.experimental_local_results(packed), strict=True
        )
    ]
    parts = iter(gathered)
    return strategy.experimental_distribute_values_from_function(lambda _: next(parts))


def _gatherable(value: tf.Tensor) -> tf.Tensor:
    """Call the bits of bfloat16 float16, as TensorFlow gathers no bfloat16 on CPUs."""
    return tf.bitcast(value, tf.float16) if value.dtype == tf.bfloat16 else value


@cache
def _gathering(strategy: tf.distribute.Strategy) -> Any:
    """Return what gathers one tensor of each replica along axis 0; not traced anew for each length."""
    return tf.function(partial(strategy.gather, axis=0), autograph=False, reduce_retracing=True)


def _is_one_process(strategy: tf.distribute.Strategy) -> bool:
    return len(strategy.extended.worker_devices) == strategy.num_replicas_in_sync
