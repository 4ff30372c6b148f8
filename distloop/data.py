"""From a source of examples to an endless stream of per-replica batches, the same for any number of replicas.

Step s of the run takes the same global batch on every strategy: its examples are a function of (seed, s) alone. The
last batch of an epoch is filled up with its own examples in turn, with weight 0, so every batch has one shape.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distloop.pipeline import Batch, Pipeline, Source, as_pipeline
from distloop.records import Records, reader
from distloop.sources import check_features, count_examples, describe_source

SHUFFLE_BUFFER = (
    10_000  # elements of a `tf.data` source that are held to shuffle; what has an index is shuffled completely
)
_PARALLEL: Any = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
_AUGMENT = 0x617567  # keeps the seeds of augmentation apart from those of the order


@dataclass(frozen=True)
class Stream:
    """Say how a source becomes batches. `seed` None keeps the order of the source and does not augment."""

    pipeline: Pipeline
    features: dict[str, tf.TensorSpec]  # of one example, without the weight of padding
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
    pipeline = as_pipeline(source)
    if seed is None:
        pipeline = dataclasses.replace(pipeline, augment=None)
    num_examples = count_examples(pipeline, name)
    return Stream(pipeline, check_features(pipeline, name), num_examples, global_batch_size, seed)


def describe(stream: Stream) -> dict[str, str]:
    """Return what workers compare before they train: how many examples, which features, which files or arrays."""
    features = {name: f"{spec.dtype.name} {spec.shape}" for name, spec in stream.features.items()}
    return {"examples": f"{stream.num_examples:,}", **features, **describe_source(stream.pipeline)}


class _Share(NamedTuple):
    size: int  # examples in a replica's batch
    begin: int  # the worker's first replica
    local: int  # and how many it has


def untuned_options() -> tf.data.Options:
    """Return options without a tuning thread, which would outlive the iterator by up to a minute."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


@tf.autograph.experimental.do_not_convert  # steps are plain Python too, and converting takes a part of the start
def per_replica_batches(
    stream: Stream, context: tf.distribute.InputContext, *, first_step: int, together: bool = False
) -> tf.data.Dataset:
    """Return one worker's endless dataset from `first_step` on: for each step, one batch for each of its replicas.

    Elements are dicts of `[global_batch / replicas, ...]` with `"weight"` float32, or with `together` a tuple of these
    for each step. Arrays and records are read by index: each worker reads its share. A `tf.data` source is read by
    every worker, which decodes its share.
    """
    share = _share(stream, context)
    first_epoch, first_step_in_epoch = divmod(first_step, stream.steps_per_epoch)

    def epochs(share_of_epoch: Callable[[tf.Tensor | None, tf.Tensor], tf.data.Dataset]) -> tf.data.Dataset:
        def share_of(epoch: tf.Tensor) -> tf.data.Dataset:
            seed = None if stream.seed is None else tf.stack([tf.cast(stream.seed, tf.int64), epoch])
            return share_of_epoch(seed, tf.where(epoch == first_epoch, tf.constant(first_step_in_epoch, tf.int64), 0))

        return tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(share_of)

    if isinstance(stream.pipeline.base, tf.data.Dataset):
        dataset = _read_in_turn(stream, stream.pipeline.base, share, epochs, together=together)
    else:
        fetch = _fetcher(stream.pipeline)

        def rows_of_epoch(seed: tf.Tensor | None, skipped: tf.Tensor) -> tf.data.Dataset:
            rows: Any = _rows(stream, share, seed)
            return tf.data.Dataset.from_tensor_slices(rows).skip(skipped * share.local)

        rows = epochs(rows_of_epoch)
        if together:

            def fetch_all(rows: Batch) -> tuple[Batch, ...]:
                return tuple(fetch({k: v[i] for k, v in rows.items()}) for i in range(share.local))

            dataset = rows.batch(share.local).map(fetch_all, **_PARALLEL)
        else:
            dataset = rows.map(fetch, **_PARALLEL)
    return endless(dataset)


def endless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the batches of a worker as `tf.distribute` should read them: ahead of the step, in order, and endless."""
    options = untuned_options()  # parallel maps then use all cores
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # Known to be endless: the compiled loop then needs no branch for an exhausted iterator.
    said = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return dataset.prefetch(tf.data.AUTOTUNE).apply(said).with_options(options)


@tf.autograph.experimental.do_not_convert
def batches_by_number(
    stream: Stream, context: tf.distribute.InputContext
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """Return a function from a dataset of numbers (int64, in any order) to a dataset of `(number, batch)`.

    Number n is element n of `per_replica_batches` from step 0. The source must be read by index.
    """
    share = _share(stream, context)
    epoch_size = stream.steps_per_epoch * share.local
    fetch = _fetcher(stream.pipeline)

    def find_rows(held: Any, number: Any) -> Any:
        epoch = number // epoch_size
        seed = None if stream.seed is None else tf.stack([tf.cast(stream.seed, tf.int64), epoch])
        # The epoch's permutation is kept, so that it is made once an epoch and not once a step.
        rows = tf.cond(held[0] == epoch, lambda: held[1], lambda: _rows(stream, share, seed))
        return (epoch, rows), (number, {name: column[number % epoch_size] for name, column in rows.items()})

    @tf.autograph.experimental.do_not_convert
    def batches(numbers: tf.data.Dataset) -> tf.data.Dataset:
        no_rows = {k: tf.zeros_like(v) for k, v in _rows(stream, share, tf.zeros([2], tf.int64)).items()}
        rows = numbers.scan((tf.constant(-1, tf.int64), no_rows), find_rows)
        return rows.map(lambda number, rows: (number, fetch(rows)), **_PARALLEL)

    return batches


def _share(stream: Stream, context: tf.distribute.InputContext) -> _Share:
    replicas = context.num_replicas_in_sync
    local = replicas // context.num_input_pipelines
    return _Share(stream.global_batch_size // replicas, context.input_pipeline_id * local, local)


def _rows(stream: Stream, share: _Share, seed: tf.Tensor | None) -> Batch:
    """Return a worker's part of an epoch: for each replica's batch its row numbers, weights and `key`; no data."""
    rows = tf.range(stream.num_examples, dtype=tf.int64)
    if seed is not None:
        rows = tf.random.experimental.stateless_shuffle(rows, seed)  # pyright: ignore[reportAttributeAccessIssue] (stub)
    grid = [stream.steps_per_epoch, stream.global_batch_size // share.size, share.size]
    places = tf.range(stream.steps_per_epoch * stream.global_batch_size, dtype=tf.int64)
    last_batch = (stream.steps_per_epoch - 1) * stream.global_batch_size
    in_turn = last_batch + (places - last_batch) % (stream.num_examples - last_batch)
    filled = tf.gather(rows, tf.where(places < stream.num_examples, places, in_turn))
    weight = tf.cast(places < stream.num_examples, tf.float32)
    columns: Any = {"row": tf.reshape(filled, grid), "weight": tf.reshape(weight, grid)}
    columns = {name: column[:, share.begin : share.begin + share.local] for name, column in columns.items()}
    columns["key"] = tf.fill([stream.steps_per_epoch, share.local], _key(seed))
    return {name: tf.reshape(column, [-1, *column.shape[2:]]) for name, column in columns.items()}


def _fetcher(pipeline: Pipeline) -> Callable[[Batch], Batch]:
    """Return the function from a batch's row numbers to the batch. It reads and decodes one example after the other.

    Many batches run at a time: a parallel call for each example would cost 40 us each, as much as decoding a small one.
    """
    base: Any = pipeline.base
    read, take = (reader(base), None) if isinstance(base, Records) else (None, _taker(base))

    def fetch(rows: Batch) -> Batch:
        if take and not pipeline.changes_examples:
            return _with_weight(pipeline.batch(take(rows["row"])), rows["weight"])
        numbers = tf.data.Dataset.from_tensor_slices(rows["row"])
        taken: Any = take and take(rows["row"])
        elements = numbers.flat_map(read) if read else tf.data.Dataset.from_tensor_slices(taken)
        numbered: Any = tf.data.Dataset.zip((numbers, elements))
        examples = numbered.map(lambda row, element: pipeline.example(element, tf.stack([rows["key"], row])))
        batch = examples.batch(rows["row"].shape[0], drop_remainder=True).get_single_element()
        return _with_weight(pipeline.batch(batch), rows["weight"])

    return fetch


def _taker(arrays: Mapping[str, np.ndarray]) -> Callable[[tf.Tensor], Batch]:
    """Return the function from row numbers to these rows of each array. Only arrays on disk stay there."""
    with tf.device("CPU:0"):  # where tf.data runs; a GPU would take them otherwise
        held = {k: a if isinstance(a, np.memmap) else tf.constant(a) for k, a in arrays.items()}

    def take(rows: tf.Tensor) -> Batch:
        return {k: _mapped(a, rows) if isinstance(a, np.memmap) else tf.gather(a, rows) for k, a in held.items()}

    return take


def _mapped(array: np.memmap, rows: tf.Tensor) -> tf.Tensor:
    taken = tf.numpy_function(lambda numbers: np.asarray(array[numbers]), [rows], array.dtype, stateful=False)
    taken.set_shape([*rows.shape, *array.shape[1:]])
    return taken


def _read_in_turn(
    stream: Stream, source: tf.data.Dataset, share: _Share, epochs: Callable[..., Any], *, together: bool
) -> tf.data.Dataset:
    """Return a worker's batches of a dataset: all of its elements are read and shuffled, the share is decoded."""
    size, pipeline = stream.global_batch_size, stream.pipeline
    first = share.begin * share.size

    def share_of_epoch(seed: tf.Tensor | None, skipped: tf.Tensor) -> tf.data.Dataset:
        elements = source.enumerate()
        if seed is not None:
            # `shuffle` mixes the graph's seed in; this sets it for the epoch's own function (0 means "by the clock").
            tf.compat.v1.set_random_seed(1)
            mixed = tf.random.experimental.stateless_fold_in(seed, seed[1])[0]  # pyright: ignore[reportAttributeAccessIssue]
            elements = elements.shuffle(SHUFFLE_BUFFER, seed=mixed, reshuffle_each_iteration=False)
        steps: Any = elements.skip(skipped * size).window(size)
        keys = tf.data.Dataset.from_tensors(_key(seed)).repeat()

        def share_of_step(rows: tf.data.Dataset, elements: Any) -> tf.data.Dataset:
            weight = tf.cast(tf.range(size, dtype=tf.int64) < rows.cardinality(), tf.float32)
            filled = tf.data.Dataset.zip((rows, elements)).repeat()
            placed = tf.data.Dataset.zip((tf.data.Dataset.from_tensor_slices(weight), keys, filled))
            return placed.skip(first).take(share.local * share.size)

        return steps.flat_map(share_of_step)

    def decode(weight: tf.Tensor, key: tf.Tensor, numbered: Any) -> Any:
        row, element = numbered
        return weight, pipeline.example(element, tf.stack([key, row]))

    elements = epochs(share_of_epoch)
    size = share.size * (share.local if together else 1)
    if pipeline.changes_examples:
        batches = elements.map(decode, **_PARALLEL).batch(size, drop_remainder=True)
    else:
        batches = elements.batch(size, drop_remainder=True).map(lambda weight, _, numbered: (weight, numbered[1]))

    def batch(weight: tf.Tensor, examples: Batch) -> Batch:
        return _with_weight(pipeline.batch(examples), weight)

    if together:
        return batches.map(lambda *all_parts: tuple(batch(*own) for own in _cut(all_parts, share)), **_PARALLEL)
    return batches.map(batch, **_PARALLEL)


def _cut(values: Any, share: _Share) -> list[Any]:
    """Return for each replica of a worker its part of a structure of tensors, along axis 0."""
    cuts = [slice(i * share.size, (i + 1) * share.size) for i in range(share.local)]
    return [tf.nest.map_structure(lambda value, cut=cut: value[cut], values) for cut in cuts]


def _key(seed: tf.Tensor | None) -> tf.Tensor:
    """Return the number (int64) that with an example's own makes the seed of its augmentation in this epoch."""
    if seed is None:
        return tf.constant(0, tf.int64)
    return tf.random.experimental.stateless_fold_in(seed, tf.constant(_AUGMENT, tf.int64))[0]  # pyright: ignore[reportAttributeAccessIssue]


def _with_weight(batch: Batch, weight: tf.Tensor) -> Batch:
    """Add the weight of padding, or multiply the source's own weights by it."""
    own = batch.get("weight")
    return {**batch, "weight": weight if own is None else tf.cast(own, tf.float32) * weight}
