import math

import numpy as np
import pytest
import tensorflow as tf

from distloop import metrics
from distloop.config import UsageError
from distloop.metrics import Mean, mean


def test_mean_is_weighted_and_skips_padding():
    metric = mean(tf.constant([1.0, 2.0, 7.0]), tf.constant([1.0, 3.0, 0.0]))
    assert (float(metric.total), float(metric.count)) == (7.0, 4.0)


def test_sums_of_all_replicas_make_the_mean(strategy):
    values = tf.constant([3.0, 5.0])

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        weight = tf.cast(tf.stack([1, replica + 1]), tf.float32)
        return metrics.pack(list(metrics.reduce({"loss": mean(values, weight)}).values()))

    per_replica = strategy.experimental_local_results(tf.function(lambda: strategy.run(step))())
    expected = [[8.0, 2.0], [21.0, 5.0]][len(per_replica) - 1]  # NumPy by hand: 3+5 over 2; 3+5+3+10 over 5
    for replica in per_replica:
        np.testing.assert_array_equal(replica.numpy(), [expected])


def test_reduced_metrics_are_not_summed_again(strategy):
    def step():
        return metrics.pack(list(metrics.reduce({"loss": Mean(tf.constant(6.0), tf.constant(2.0), True)}).values()))

    for replica in strategy.experimental_local_results(tf.function(lambda: strategy.run(step))()):
        np.testing.assert_array_equal(replica.numpy(), [[6.0, 2.0]])


def test_the_host_divides_in_float64_and_nothing_counted_is_nan():
    floats = metrics.to_floats(["a", "b"], np.array([[1.0, 3.0], [0.0, 0.0]]))
    assert floats["a"] == 1 / 3
    assert math.isnan(floats["b"])


@pytest.mark.parametrize("values", [tf.constant(1.0), tf.zeros([3]), tf.zeros([2, 1])])
def test_mean_of_anything_but_one_value_an_example_is_refused(values):
    with pytest.raises(UsageError, match="expected one value and one weight an example"):
        mean(values, tf.ones([2]))


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "the step returned nothing; expected a dict of named metrics"),
        ({}, "the step returned a dict; expected a dict of named metrics"),
        (tf.constant(1.0), "the step returned a tensor of shape ()"),
        ({"loss": tf.constant(1.0)}, "returned a tensor of shape () as 'loss', which is not a metric"),
        ({"loss": 0.5}, "returned a float as 'loss'"),
        ({"epoch_loss": Mean(tf.constant(1.0), tf.constant(1.0))}, "a metric named 'epoch_loss', which the logs use"),
        ({"step": Mean(tf.constant(1.0), tf.constant(1.0))}, "a metric named 'step', which the logs use themselves"),
    ],
)
def test_a_step_that_returns_no_metrics_is_refused(returned, sentence):
    with pytest.raises(UsageError) as refusal:
        metrics.check(returned)
    assert sentence in str(refusal.value)
