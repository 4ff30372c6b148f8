"""Promise P4 for the stream of a run: every example once an epoch, in one order for any number of workers."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from distloop.caching import in_memory
from distloop.data import make_stream, per_replica_batches
from distloop.errors import UsageError
from distloop.inputs import untuned
from tests.streams import BATCH, STEPS, N, arrays, dataset, ids, read


@pytest.mark.parametrize("source", [arrays, dataset])
@pytest.mark.parametrize(("workers", "replicas"), [(1, 1), (1, 4), (2, 2), (2, 8), (4, 4)])
def test_every_example_comes_once_an_epoch_in_the_order_of_one_worker(source, workers, replicas):
    batches = read(source(), steps=3 * STEPS, workers=workers, replicas=replicas)
    alone = read(source(), steps=3 * STEPS)
    for name in ("id", "double", "weight"):
        np.testing.assert_array_equal(batches[name], alone[name])
    np.testing.assert_array_equal(batches["double"], 2 * batches["id"])
    epochs = [ids(batches, slice(e * STEPS, (e + 1) * STEPS)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("source", [arrays, dataset])
def test_the_order_depends_on_the_seed_alone(source):
    tf.random.set_seed(1)
    first = read(source(), steps=4)
    tf.random.set_seed(2)
    np.testing.assert_array_equal(first["id"], read(source(), steps=4)["id"])
    assert (first["id"] != read(source(), steps=4, seed=8)["id"]).any()
    assert ids(read(source(), steps=STEPS, seed=None), slice(None)) == list(range(N))


@pytest.mark.parametrize("source", [arrays, dataset])
@pytest.mark.parametrize("first_step", [1, 3, 5, 8])
def test_a_stream_that_starts_late_goes_on_as_if_it_had_not_stopped(source, first_step):
    whole = read(source(), steps=first_step + 4)
    late = read(source(), steps=4, first_step=first_step)
    for name in whole:
        np.testing.assert_array_equal(late[name], whole[name][first_step:])


@pytest.mark.parametrize("source", [arrays, dataset])
def test_the_last_batch_is_filled_up_with_examples_of_weight_0(source):
    batches = read(source(), steps=STEPS, seed=None)
    np.testing.assert_array_equal(batches["weight"].sum(axis=1), [8, 8, 5])
    assert set(batches["id"][2]) <= set(range(N))  # real examples: arithmetic on padding is as safe as on data


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_the_sources_own_weights_are_kept(kind):
    source = {"id": np.arange(N), "weight": np.linspace(0.5, 2, N)}
    source = tf.data.Dataset.from_tensor_slices(source) if kind == "dataset" else source
    batches = read(source, steps=STEPS, seed=None)
    np.testing.assert_allclose(batches["weight"].ravel()[:N], np.linspace(0.5, 2, N), rtol=1e-6)
    assert (batches["weight"].ravel()[N:] == 0).all()


def test_steps_and_examples_are_counted_without_padding():
    stream = make_stream(arrays(), name="train_data", global_batch_size=BATCH, seed=0)
    assert stream.steps_per_epoch == STEPS
    assert [stream.examples_before(step) for step in range(8)] == [0, 8, 16, 21, 29, 37, 42, 50]


def test_in_memory_holds_what_the_dataset_holds():
    copied = in_memory(dataset())
    np.testing.assert_array_equal(copied["double"], arrays()["double"])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda: {"id": np.zeros([0])}, "train_data has no examples"),
        (lambda: dataset().take(0), "train_data has no examples"),
        (lambda: dataset().repeat(), "train_data is endless"),
        (lambda: dataset().filter(lambda x: x["id"] > 3), "train_data does not know its length"),
        (lambda: {"a": np.zeros(3), "b": np.zeros(4)}, "arrays of shapes {'a': (3,), 'b': (4,)}"),
        (lambda: {"a": 3}, "arrays of shapes {'a': ()}; expected one entry an example in each"),
        (lambda: dataset().batch(4), "expected single examples of one fixed shape: drop .batch()"),
        (
            lambda: {"a": np.ones([3]), "weight": np.ones([3, 1])},
            "has a 'weight' of shape [1] an example; expected one",
        ),
        (lambda: dataset().map(lambda x: {**x, "weight": tf.ones([2])}), "has a 'weight' of shape [2] an example"),
        (lambda: [1, 2], "train_data is a list; expected a tf.data.Dataset or a dict of arrays"),
        (lambda: dataset().map(lambda x: (x["id"], x["double"])), "expected a flat dict of tensors"),
        (lambda: tf.data.Dataset.from_generator(iter, output_signature={"t": tf.TensorSpec([None])}), "'t' of shape"),
    ],
)
def test_a_source_that_cannot_be_batched_is_refused(source, sentence):
    with pytest.raises(UsageError) as refusal:
        make_stream(source(), name="train_data", global_batch_size=BATCH, seed=0)
    assert sentence in str(refusal.value)


def test_what_cannot_be_arrays_is_refused_in_memory():
    with pytest.raises(UsageError, match="the data set given to in_memory has no examples"):
        in_memory(dataset().take(0))
    with pytest.raises(UsageError, match="the data set given to in_memory yields"):
        in_memory(dataset().map(lambda x: (x["id"], x["double"])))


def test_nothing_is_left_for_tensorflow_to_shard():
    stream = make_stream(dataset(), name="data", global_batch_size=BATCH, seed=0)
    batches = per_replica_batches(stream, tf.distribute.InputContext(2, 0, 2), first_step=0)
    assert batches.options().experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF


def test_iterators_over_several_devices_get_no_tuning_thread(mirrored):
    # This pins the private function that `untuned` replaces.
    stream = make_stream(arrays(), name="data", global_batch_size=BATCH, seed=0)
    dataset = mirrored.distribute_datasets_from_function(
        lambda context: per_replica_batches(stream, context, first_step=0)
    )
    original, made = multi_device_iterator_ops._create_device_dataset, []
    with untuned():
        create = multi_device_iterator_ops._create_device_dataset
        multi_device_iterator_ops._create_device_dataset = lambda *a: made.append(create(*a)) or made[-1]
        iterator = iter(dataset)
    assert multi_device_iterator_ops._create_device_dataset is original
    assert [one.options().autotune.enabled for one in made] == [False, False]
    assert set(next(iterator)) == {"id", "double", "weight"}
