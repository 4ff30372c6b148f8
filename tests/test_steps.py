import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig
from distloop.errors import UsageError
from distloop.metrics import mean
from tests import toy

TASK = toy.make_task(RunConfig(seed=0))


def test_one_call_of_many_steps_equals_many_calls_of_one(strategy):
    state, _, call = toy.compiled(strategy, TASK)
    sums = call(7).sums
    other_state, _, other_call = toy.compiled(strategy, TASK)
    np.testing.assert_array_equal(sums, sum(other_call(1).sums for _ in range(7)))
    expected = toy.to_numpy(other_state)
    for name, value in toy.to_numpy(state).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert int(state.step.numpy()) == 7


def test_calls_of_any_length_and_uneven_batches_share_one_trace(strategy):
    _, _, call = toy.compiled(strategy, TASK)
    for steps in (1, 5, 2, 50):
        assert call(steps).sums.shape == (2,)
    assert call._call.experimental_get_tracing_count() == 1


def test_sums_count_every_example_of_an_epoch_once(strategy):
    _, stream, call = toy.compiled(strategy, TASK, training=False)
    assert [call(1).sums[1] for _ in range(stream.steps_per_epoch)] == [4, 4, 2]


def test_evaluation_leaves_the_step_alone(strategy):
    state, _, call = toy.compiled(strategy, TASK, training=False)
    call(3)
    assert int(state.step.numpy()) == 0


def test_metrics_beside_minimize_are_reduced_over_replicas(strategy):
    def step(state, batch):
        return {**TASK.train_step(state, batch), "y": mean(batch["y"], batch["weight"])}

    _, _, call = toy.compiled(strategy, dataclasses.replace(TASK, train_step=step))
    assert list(call.metrics) == ["loss", "y"]
    np.testing.assert_allclose(call(3).sums[2:], [toy.DATA["y"].sum(), 10], rtol=1e-5)


@pytest.mark.parametrize("returned", [None, {}, {"loss": tf.constant(1.0)}])
def test_a_step_without_metrics_is_refused_before_anything_runs(returned):
    with pytest.raises(UsageError, match="the step returned"):
        toy.compiled(tf.distribute.get_strategy(), dataclasses.replace(TASK, train_step=lambda state, batch: returned))


def test_an_error_in_the_users_step_keeps_its_type_and_its_line():
    def step(state, batch):
        raise KeyError("imge")

    with pytest.raises(KeyError, match="imge") as error:
        toy.compiled(tf.distribute.get_strategy(), dataclasses.replace(TASK, train_step=step))
    assert error.traceback[-1].path.name == "test_steps.py"


def test_noise_drawn_from_the_step_is_the_same_in_every_run(strategy):
    def step(state, batch):
        seed = tf.stack([tf.cast(state.step, tf.int32), 0])
        return {**TASK.train_step(state, batch), "noise": mean(tf.random.stateless_normal([1], seed), tf.ones([1]))}

    _, _, call = toy.compiled(strategy, dataclasses.replace(TASK, train_step=step))
    expected = [float(tf.random.stateless_normal([1], [number, 0])[0]) for number in range(3)]
    noise = [call(1).sums[2:] for _ in range(3)]
    np.testing.assert_allclose([total / count for total, count in noise], expected, rtol=1e-6)
