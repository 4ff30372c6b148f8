import math

import numpy as np
import pytest
import tensorflow as tf

from distloop import metrics
from distloop.errors import UsageError
from distloop.metrics import Metric, gather, mean
from tests.on_replicas import values_on_each_replica

ONE = tf.constant(1.0)
GENERATOR = np.random.default_rng(0)
# Two global batches of 8; on two replicas, the second of the last has nothing but padding.
BATCHES = [
    {
        "id": np.arange(8, dtype=np.int64) + 8 * batch,
        "value": GENERATOR.normal(size=8).astype(np.float32),
        "tokens": GENERATOR.normal(size=(8, 3)).astype(np.float32),
        "flag": GENERATOR.integers(0, 2, 8).astype(bool),
        "half": GENERATOR.normal(size=(8, 2)).astype(np.float16),
        "weight": np.array([[1, 2, 0.5, 1, 1, 3, 1, 1], [1, 0.25, 1, 0, 0, 0, 0, 0]][batch], np.float32),
    }
    for batch in range(2)
]
ALL = {name: np.concatenate([batch[name] for batch in BATCHES]) for name in BATCHES[0]}
REAL = ALL["weight"] > 0


def values(strategy, step, batches=BATCHES):
    """Return what every replica computes, once all are found to agree."""
    first, *others = values_on_each_replica(strategy, step, batches)
    for other in others:
        np.testing.assert_equal(other, first)  # which takes a NaN for equal to itself
    return first


def test_a_mean_is_weighted_over_all_replicas_and_steps(strategy):
    found = values(strategy, lambda batch: {"loss": mean(batch["value"], batch["weight"])})
    assert found == {"loss": pytest.approx(np.average(ALL["value"], weights=ALL["weight"]), abs=1e-6)}


def test_a_mean_over_tokens_has_weights_of_tokens(strategy):
    mask = (np.arange(3) < 2) * ALL["weight"][:, None]
    found = values(
        strategy,
        lambda batch: {"loss": mean(batch["tokens"], tf.cast(tf.range(3) < 2, tf.float32) * batch["weight"][:, None])},
    )
    assert found["loss"] == pytest.approx(np.average(ALL["tokens"], weights=mask), abs=1e-6)


def test_a_weight_of_zero_leaves_out_even_what_is_not_finite():
    total, count = mean(tf.constant([1.0, 2.0, math.nan, math.inf]), tf.constant([1.0, 3.0, 0.0, 0.0])).parts
    assert (float(total), float(count)) == (7.0, 4.0)


def test_parts_of_any_shape_and_type_are_summed_and_computed_on_the_host(strategy):
    def step(batch):
        present = tf.cast(batch["weight"] > 0, tf.int32)
        parts = (
            tf.reduce_sum(tf.cast(batch["half"], tf.float16) * tf.cast(present, tf.float16)[:, None], axis=0),
            tf.reduce_sum(present),
            tf.reduce_any(batch["id"] == 9),
        )
        return {"all": Metric(parts, lambda sums, count, nine: {"mean": sums / count, "nine": nine, "count": count})}

    found = values(strategy, step)
    expected = ALL["half"][REAL].astype(np.float64).mean(axis=0)
    assert found == {
        "all_mean_0": pytest.approx(expected[0], abs=1e-3),
        "all_mean_1": pytest.approx(expected[1], abs=1e-3),
        "all_nine": 1.0,
        "all_count": 11.0,
    }


def test_perplexity_is_an_exponential_on_the_host(strategy):
    def step(batch):
        parts = (tf.reduce_sum(batch["value"] ** 2 * batch["weight"]), tf.reduce_sum(batch["weight"]))
        return {"perplexity": Metric(parts, lambda total, count: math.exp(total / count))}

    expected = math.exp(np.average(ALL["value"] ** 2, weights=ALL["weight"]))
    assert values(strategy, step)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_what_is_gathered_is_in_the_order_of_the_data_without_padding(strategy):
    def compute(ids, half, flags, weights):
        assert (ids.dtype, half.dtype, flags.dtype, weights.dtype) == (np.int64, np.float16, bool, np.float32)
        for name, array in (("id", ids), ("half", half), ("flag", flags), ("weight", weights)):
            np.testing.assert_array_equal(array, ALL[name][REAL])
        return np.median(half, axis=0)

    found = values(
        strategy,
        lambda b: {"median": gather(compute, b["id"], b["half"], b["flag"], b["weight"], weight=b["weight"])},
    )
    assert found == {f"median_{i}": value for i, value in enumerate(np.median(ALL["half"][REAL], axis=0))}


def test_gathered_and_summed_metrics_mix_in_any_order(strategy):
    def sums(half, flags):
        return {"sum": half.sum(), "flags": flags.sum()}

    def step(batch):
        weight = batch["weight"]
        return {
            "last": gather(lambda ids: ids[-1], batch["id"], weight=weight),
            "loss": mean(batch["value"], weight),
            "half": gather(sums, batch["half"], batch["flag"], weight=weight),
            "flags": mean(batch["flag"], weight),
        }

    found = values(strategy, step)
    assert list(found) == ["last", "loss", "half_sum", "half_flags", "flags"]
    assert (found["last"], found["half_flags"]) == (10, ALL["flag"][REAL].sum())
    assert found["half_sum"] == pytest.approx(ALL["half"][REAL].sum(), rel=1e-2)
    assert found["flags"] == pytest.approx(np.average(ALL["flag"], weights=ALL["weight"]), abs=1e-6)


def test_an_evaluation_may_have_gathered_metrics_only(strategy):
    found = values(strategy, lambda batch: {"top": gather(np.max, batch["value"], weight=batch["weight"])})
    assert found == {"top": ALL["value"][REAL].max()}


def test_integers_are_gathered_exactly(strategy):
    batch = {"id": np.array([2**53, -(2**53) + 1], np.int64), "weight": np.ones(2, np.float32)}
    seen = []
    values(strategy, lambda b: {"id": gather(lambda ids: seen.append(ids) or 0, b["id"], weight=b["weight"])}, [batch])
    for ids in seen:
        assert ids.tolist() == [2**53, -(2**53) + 1]


def test_reduced_metrics_are_not_summed_again(strategy):
    step = {"all": Metric((tf.constant(6.0),), float, reduced=True), "one": Metric((ONE,), float)}
    found = values(strategy, lambda batch: step, BATCHES[:1])
    assert found == {"all": 6.0, "one": strategy.num_replicas_in_sync}


def test_the_host_divides_in_float64_and_nothing_counted_is_nan():
    two = {"a": mean([0.0], [1.0]), "b": mean([0.0], [1.0])}
    floats = metrics.results(two, np.array([1.0, 3.0, 0.0, 0.0]))
    assert floats["a"] == 1 / 3
    assert math.isnan(floats["b"])


def test_metrics_that_are_not_finite_are_named():
    three = {"a": mean([0.0], [1.0]), "b": Metric((tf.zeros([2]), ONE), max), "c": mean([0.0], [1.0])}
    assert metrics.not_finite(three, np.array([1, math.nan, 0, 0, 0, 1, 1])) == ["a"]
    assert metrics.not_finite(three, np.array([1, 1, 0, math.inf, math.nan, 1, 1])) == ["b"]


@pytest.mark.parametrize(
    ("value", "floats"),
    [
        (0.5, {"m": 0.5}),
        (np.array([[2]], np.int32), {"m": 2.0}),
        (True, {"m": 1.0}),
        (tf.constant([1.0, 2.0]), {"m_0": 1.0, "m_1": 2.0}),
        (np.eye(2), {"m_0": 1.0, "m_1": 0.0, "m_2": 0.0, "m_3": 1.0}),
        ({"a": 1, "b": [2, 3], "c": {"d": np.float32(4)}}, {"m_a": 1.0, "m_b_0": 2.0, "m_b_1": 3.0, "m_c_d": 4.0}),
    ],
)
def test_numbers_arrays_and_dicts_become_floats_by_name(value, floats):
    found = metrics.to_floats("m", value)
    assert found == floats
    assert {type(number) for number in found.values()} == {float}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: mean(tf.constant(1.0), tf.ones([2])), "expected one value and one weight an example"),
        (lambda: mean(tf.zeros([3]), tf.ones([2])), "expected one value and one weight an example"),
        (lambda: mean(tf.zeros([2, 1]), tf.ones([2])), "expected one value and one weight an example"),
        (lambda: gather(max, tf.zeros([3]), weight=tf.ones([2])), "gather got a value of shape (3,) and a weight"),
        (lambda: gather(max, tf.constant(1.0), weight=tf.ones([2])), "gather got a value of shape ()"),
        (lambda: gather(max, tf.zeros([2, 3]), weight=tf.ones([2, 3])), "and the weight [batch]"),
        (lambda: gather(max, tf.constant(["a"]), weight=tf.ones([1])), "of shape (1,) and dtype string"),
        (lambda: Metric((), float), "expected Metric((total, count), lambda"),
        (lambda: Metric(ONE, float), "expected Metric((total, count), lambda"),
        (lambda: Metric((ONE,), 3), "expected Metric((total, count), lambda"),
        (lambda: metrics.to_floats("m", None), "the metric 'm' computed nothing; expected a number"),
        (lambda: metrics.to_floats("m", "three"), "the metric 'm' computed a str; expected a number"),
        (
            lambda: metrics.results(
                {"a_b": Metric((ONE,), float), "a": Metric((ONE,), lambda x: {"b": x})}, np.ones(2)
            ),
            "two values of the step's metrics are named 'a_b'; rename the metric 'a'",
        ),
    ],
)
def test_what_is_no_metric_is_refused(wrong, sentence):
    with pytest.raises(UsageError) as refusal:
        wrong()
    assert sentence in str(refusal.value)


def test_a_part_of_unknown_shape_is_refused():
    def step(values):
        Metric((values,), float)

    with pytest.raises(UsageError, match=r"Metric got a part of shape \(None,\)"):
        tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([None]))


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "the step returned nothing; expected a dict of named metrics"),
        ({}, "the step returned a dict; expected a dict of named metrics"),
        (tf.constant(1.0), "the step returned a tensor of shape ()"),
        ({"loss": tf.constant(1.0)}, "returned a tensor of shape () as 'loss', which is not a metric"),
        ({"loss": 0.5}, "returned a float as 'loss'"),
        ({"epoch_loss": Metric((ONE,), float)}, "a metric named 'epoch_loss', which the logs use"),
        ({"step": Metric((ONE,), float)}, "a metric named 'step', which the logs use themselves"),
    ],
)
def test_a_step_that_returns_no_metrics_is_refused(returned, sentence):
    with pytest.raises(UsageError) as refusal:
        metrics.check(returned)
    assert sentence in str(refusal.value)
