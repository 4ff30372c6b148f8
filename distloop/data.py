"""From a source of examples to an endless stream of per-replica batches, the same for any number of replicas.

Step s of the run takes the same global batch on every strategy: its examples are a function of (seed, s) alone. The
last batch of an epoch is filled up with its own examples in turn, with weight 0, so every batch has one shape.
"""

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from distloop.config import UsageError
from distloop.task import Batch, Source

SHUFFLE_BUFFER = 10_000  # examples of a `tf.data` source that are held to shuffle; arrays are shuffled completely


@dataclass(frozen=True)
class Stream:
    """Say how a source becomes batches. `seed` None keeps the order of the source."""

    source: Source
    num_examples: int
    global_batch_size: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches that hold each example once."""
        return -(-self.num_examples // self.global_batch_size)

    def examples_before(self, step: int) -> int:
        """Return how many examples the steps before `step` hold, padding not counted."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_examples + min(step_in_epoch * self.global_batch_size, self.num_examples)


def make_stream(source: Source, *, name: str, global_batch_size: int, seed: int | None) -> Stream:
    """Check a source (called `name` in messages) and count its examples. Raises UsageError if it cannot be batched."""
    if isinstance(source, tf.data.Dataset):
        _check_elements(source.element_spec, name)
        num_examples = int(source.cardinality())
        if num_examples == tf.data.UNKNOWN_CARDINALITY:
            raise UsageError(
                f"{name} does not know its length; end it with .apply(tf.data.experimental.assert_cardinality(n))."
            )
        if num_examples == tf.data.INFINITE_CARDINALITY:
            raise UsageError(f"{name} is endless; drop .repeat(), the library repeats it.")
    else:
        num_examples = _common_length(source, name)
    if num_examples == 0:
        raise UsageError(f"{name} has no examples; expected at least one: check its filters, its folder and its split.")
    return Stream(source, num_examples, global_batch_size, seed)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Let the iterators over several devices that are made here have no tuning thread.

    tf.data's thread sleeps for up to a minute and is not woken when the iterator ends (TensorFlow 2.21), so that a run
    on several replicas would end as late; `tf.distribute` offers no option for its iterators. The function is private.
    """
    original = multi_device_iterator_ops._create_device_dataset

    def create(*arguments: Any) -> Any:
        return original(*arguments).with_options(_untuned_options())

    multi_device_iterator_ops._create_device_dataset = create
    try:
        yield
    finally:
        multi_device_iterator_ops._create_device_dataset = original


def _untuned_options() -> tf.data.Options:
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def describe(stream: Stream) -> dict[str, str]:
    """Return what workers compare before they train: how many examples, and each feature's type, shape and checksum.

    The checksum is of up to 1,000 rows of an array; a `tf.data` source is not read for it.
    """
    described = {"examples": f"{stream.num_examples:,}"}
    if isinstance(stream.source, tf.data.Dataset):
        spec: Any = stream.source.element_spec
        return described | {name: f"{tensor.dtype.name} {tensor.shape}" for name, tensor in spec.items()}
    for name, array in stream.source.items():
        rows = np.asarray(array)[:: -(-stream.num_examples // 1000)]
        described[name] = f"{rows.dtype} {rows.shape[1:]} crc {zlib.crc32(np.ascontiguousarray(rows).tobytes()):08x}"
    return described


def in_memory(dataset: tf.data.Dataset) -> dict[str, np.ndarray]:
    """Read a finite dataset of single examples once and return it as arrays `[examples, ...]`.

    Arrays are shuffled completely and resumed at once; worth it for whatever fits in memory on every worker.
    """
    name = "the data set given to in_memory"
    _check_elements(dataset.element_spec, name)
    batches = list(dataset.batch(1024).as_numpy_iterator())
    if not batches:
        raise UsageError(f"{name} has no examples; expected at least one.")
    return {feature: np.concatenate([batch[feature] for batch in batches]) for feature in batches[0]}


@tf.autograph.experimental.do_not_convert  # nothing here needs it, and converting takes a part of the start
def per_replica_batches(stream: Stream, context: tf.distribute.InputContext, *, first_step: int) -> tf.data.Dataset:
    """Return one worker's endless dataset from `first_step` on: for each step, one batch for each of its replicas.

    Elements are dicts of `[global_batch / replicas, ...]` with `"weight"` float32. Every worker reads the whole source
    and keeps its share; less is read only from a source that can be read by index, as arrays are.
    """
    replicas = context.num_replicas_in_sync
    local = replicas // context.num_input_pipelines
    begin = context.input_pipeline_id * local
    shape = [replicas, stream.global_batch_size // replicas]
    first_epoch, first_step_in_epoch = divmod(first_step, stream.steps_per_epoch)

    def epoch_steps(epoch: tf.Tensor) -> tf.data.Dataset:
        seed = None if stream.seed is None else tf.stack([tf.cast(stream.seed, tf.int64), epoch])
        if isinstance(stream.source, tf.data.Dataset):
            steps = _dataset_steps(stream, stream.source, seed)
        else:
            steps = _array_steps(stream, seed)
        steps = steps.skip(tf.where(epoch == first_epoch, tf.constant(first_step_in_epoch, tf.int64), 0))

        def local_share(batch: Batch) -> Batch:
            return {k: tf.reshape(v, [*shape, *v.shape[1:]])[begin : begin + local] for k, v in batch.items()}

        return steps.map(local_share).unbatch()

    dataset = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_steps)
    if not isinstance(stream.source, tf.data.Dataset):
        # Rows are read after the share is taken, many batches at a time.
        with tf.device("CPU:0"):  # where tf.data runs; a GPU would take them otherwise
            arrays = {name: tf.constant(array) for name, array in stream.source.items()}
        dataset = dataset.map(lambda rows: _take(arrays, rows), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = _untuned_options()  # parallel maps then use all cores
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # Known to be endless: the compiled loop then needs no branch for an exhausted iterator.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return dataset.prefetch(tf.data.AUTOTUNE).apply(endless).with_options(options)


def _array_steps(stream: Stream, seed: tf.Tensor | None) -> tf.data.Dataset:
    """Return an epoch's row numbers and weights, `[global_batch]` a step."""
    rows = tf.range(stream.num_examples, dtype=tf.int64)
    if seed is not None:
        rows = tf.random.experimental.stateless_shuffle(rows, seed)  # pyright: ignore[reportAttributeAccessIssue] (stub)
    grid = [stream.steps_per_epoch, stream.global_batch_size]
    places = tf.range(stream.steps_per_epoch * stream.global_batch_size, dtype=tf.int64)
    last_batch = (stream.steps_per_epoch - 1) * stream.global_batch_size
    in_turn = last_batch + (places - last_batch) % (stream.num_examples - last_batch)
    filled = tf.gather(rows, tf.where(places < stream.num_examples, places, in_turn))
    weight = tf.cast(places < stream.num_examples, tf.float32)
    columns: Any = {"row": tf.reshape(filled, grid), "weight": tf.reshape(weight, grid)}
    return tf.data.Dataset.from_tensor_slices(columns)


def _take(arrays: Batch, rows: Batch) -> Batch:
    batch = {name: tf.gather(array, rows["row"]) for name, array in arrays.items()}
    return _with_weight(batch, rows["weight"])


def _dataset_steps(stream: Stream, source: tf.data.Dataset, seed: tf.Tensor | None) -> tf.data.Dataset:
    """Return an epoch's batches, filled up to `[global_batch, ...]`."""
    if seed is not None:
        # `shuffle` mixes the graph's seed in; this sets it for the epoch's own function only (0 means "by the clock").
        tf.compat.v1.set_random_seed(1)
        mixed = tf.random.experimental.stateless_fold_in(seed, seed[1])[0]  # pyright: ignore[reportAttributeAccessIssue]
        source = source.shuffle(SHUFFLE_BUFFER, seed=mixed, reshuffle_each_iteration=False)
    positions = tf.range(stream.global_batch_size)

    def fill_up(batch: Batch) -> Batch:
        size = tf.shape(next(iter(batch.values())))[0]
        filled = {name: tf.gather(value, positions % size) for name, value in batch.items()}
        return _with_weight(filled, tf.cast(positions < size, tf.float32))

    return source.batch(stream.global_batch_size, num_parallel_calls=tf.data.AUTOTUNE).map(fill_up)


def _with_weight(batch: Batch, weight: tf.Tensor) -> Batch:
    """Add the weight of padding, or multiply the source's own weights by it."""
    own = batch.get("weight")
    return {**batch, "weight": weight if own is None else tf.cast(own, tf.float32) * weight}


def _check_elements(spec: object, name: str) -> None:
    if not isinstance(spec, Mapping) or not all(isinstance(feature, tf.TensorSpec) for feature in spec.values()):
        raise UsageError(
            f"{name} yields {spec}; expected a flat dict of tensors an example, such as "
            '.map(lambda x, y: {"image": x, "label": y}).'
        )
    for feature, tensor in spec.items():
        if not tensor.shape.is_fully_defined():
            raise UsageError(
                f"{name} yields {feature!r} of shape {tensor.shape}; expected single examples of one fixed shape: "
                "drop .batch(), which the library does, and pad, crop or resize what varies."
            )
    _check_weight(spec["weight"].shape.as_list() if "weight" in spec else [], name)


def _common_length(arrays: object, name: str) -> int:
    if not isinstance(arrays, Mapping) or not arrays:
        raise UsageError(f"{name} is a {type(arrays).__name__}; expected a tf.data.Dataset or a dict of arrays.")
    lengths = {feature: np.shape(array)[:1] for feature, array in arrays.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        shapes = {feature: np.shape(array) for feature, array in arrays.items()}
        raise UsageError(f"{name} has arrays of shapes {shapes}; expected one entry an example in each.")
    _check_weight(list(np.shape(arrays["weight"])[1:]) if "weight" in arrays else [], name)
    return next(iter(lengths.values()))[0]


def _check_weight(shape: list[int], name: str) -> None:
    if shape:
        raise UsageError(
            f"{name} has a 'weight' of shape {shape} an example; expected one number, the weight of the example "
            "in the loss: reshape it, or rename it if it is something else."
        )
