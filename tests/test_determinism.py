"""A dataset whose order or numbers could not be repeated is refused, in one sentence that says what to do."""

import numpy as np
import pytest
import tensorflow as tf

from distloop import Pipeline
from distloop.data import make_stream
from distloop.errors import UsageError
from tests.streams import arrays, dataset

GENERATOR = tf.random.Generator.from_seed(1)


def noisy(x):
    return {**x, "u": tf.random.uniform([])}


def one_in_two(x):
    return {"id": tf.cond(x["id"] % 2 == 0, lambda: tf.random.normal([], seed=1), lambda: 0.0)}


def sampled(**seed):
    mixed = tf.data.Dataset.sample_from_datasets([dataset(), dataset()], **seed)
    return mixed.apply(tf.data.experimental.assert_cardinality(42))


def listed(**shuffle):
    return tf.data.Dataset.list_files([__file__], **shuffle).map(lambda name: {"name": name})


def inner(**deterministic):
    drawn = dataset().interleave(lambda x: tf.data.Dataset.from_tensors(x), num_parallel_calls=2, **deterministic)
    return drawn.apply(tf.data.experimental.assert_cardinality(21))


def refuse(source, sentence):
    with pytest.raises(UsageError) as refusal:
        make_stream(source, name="train_data", global_batch_size=2, seed=0)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda: dataset().shuffle(9), "train_data shuffles by itself"),
        (lambda: dataset().shuffle(9, seed=1), "drop .shuffle() (the library shuffles)"),
        (lambda: dataset().shuffle(9, reshuffle_each_iteration=False), "train_data shuffles by itself"),
        (lambda: listed(), "list files with shuffle=False"),
        (lambda: dataset().map(noisy), "draws random numbers (RandomUniform)"),
        (lambda: dataset().map(one_in_two), "draw them with tf.random.stateless_uniform"),
        (lambda: dataset().map(lambda x: {"u": GENERATOR.uniform([])}), "draws random numbers (RngReadAndSkip)"),
        (lambda: sampled(), "draws random numbers without a seed (Dataset.random, sample_from_datasets)"),
        (lambda: sampled(seed=3, rerandomize_each_iteration=True), "without a seed"),
        (lambda: dataset().map(dict, num_parallel_calls=2, deterministic=False), "lets the order vary (ParallelMap"),
        (lambda: inner(deterministic=False), "lets the order vary (ParallelInterleave"),
        (lambda: Pipeline(arrays(), map=noisy), "draws random numbers (RandomUniform)"),
        (lambda: Pipeline(arrays(), augment=lambda x, seed: noisy(x)), "which is given a seed"),
        (lambda: Pipeline(dataset(), map_batch=lambda b: {"u": tf.random.uniform([tf.shape(b["id"])[0]])}), "draws"),
    ],
)
def test_what_cannot_be_repeated_is_refused(source, sentence):
    tf.random.set_seed(None)
    refuse(source(), sentence)


@pytest.mark.parametrize(
    "source",
    [
        lambda: dataset().shuffle(9, seed=1, reshuffle_each_iteration=False).take(5),
        lambda: listed(shuffle=False),
        lambda: sampled(seed=3),
        lambda: inner(),
        lambda: dataset().map(lambda x: {"u": tf.random.stateless_uniform([], [1, x["id"]])}, num_parallel_calls=2),
        lambda: Pipeline(dataset(), augment=lambda x, seed: {"u": tf.random.stateless_uniform([], seed)}),
        lambda: tf.data.Dataset.from_generator(
            lambda: iter([{"x": 1.0}]), output_signature={"x": tf.TensorSpec([])}
        ).apply(tf.data.experimental.assert_cardinality(1)),
    ],
)
def test_what_can_be_repeated_passes(source):
    make_stream(source(), name="train_data", global_batch_size=2, seed=0)


def test_our_option_outweighs_one_that_lets_the_order_vary():
    from tests.streams import ids, read

    options = tf.data.Options()
    options.deterministic = False
    loose = dataset().map(dict, num_parallel_calls=4).with_options(options)
    np.testing.assert_array_equal(ids(read(loose, steps=3, seed=None)), np.arange(21))
