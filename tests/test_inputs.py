"""One iterator for all local replicas gives each of them the batches that `tf.distribute` would give it."""

import numpy as np
import pytest
import tensorflow as tf

from distloop import Pipeline
from distloop.data import make_stream, per_replica_batches
from distloop.inputs import distributed, next_batch
from tests.streams import BATCH, arrays, dataset

SOURCES = {
    "arrays": arrays,
    "each example": lambda: Pipeline(arrays(), map=lambda example: {**example, "triple": 3 * example["id"]}),
    "tf.data": dataset,
    "tf.data, each example": lambda: Pipeline(dataset(), map=lambda example: {**example, "triple": 3 * example["id"]}),
}


def taken(strategy, iterable, steps):
    """Return what each local replica gets in each step."""
    iterator = iter(iterable)
    batches = [next_batch(strategy, iterator) for _ in range(steps)]
    values = [{k: strategy.experimental_local_results(v) for k, v in batch.items()} for batch in batches]
    return [[{k: v[i].numpy() for k, v in step.items()} for i in range(2)] for step in values]


@pytest.mark.parametrize("source", SOURCES)
def test_replicas_on_the_host_get_the_batches_of_tf_distribute(mirrored, source):
    stream = make_stream(SOURCES[source](), name="data", global_batch_size=BATCH, seed=7)
    found = distributed(mirrored, stream, first_step=2)
    assert isinstance(found, tf.data.Dataset)  # and so read by one iterator
    expected = mirrored.distribute_datasets_from_function(
        lambda context: per_replica_batches(stream, context, first_step=2)
    )
    for ours, theirs in zip(taken(mirrored, found, 5), taken(mirrored, expected, 5), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_one_device_without_a_strategy_reads_a_plain_dataset():
    stream = make_stream(arrays(), name="data", global_batch_size=BATCH, seed=7)
    assert isinstance(distributed(tf.distribute.get_strategy(), stream, first_step=0), tf.data.Dataset)
