"""`minimize` against NumPy: a linear model, weighted squared errors, plain gradient descent."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import metrics
from distloop.errors import UsageError
from distloop.gradients import minimize
from distloop.metrics import mean
from distloop.task import State
from tests.shared_step import exchanges_of

X = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [-2.0, 1.0]], np.float32)
Y = np.array([1.0, 2.0, -1.0, 0.5], np.float32)
START = np.array([0.3, -0.2], np.float32)
RATE = 0.1


def linear_state(strategy, optimizer=None):
    with strategy.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, use_bias=False)])
        model.layers[0].kernel.assign(START[:, None])
        return State(model=model, optimizer=optimizer() if optimizer else keras.optimizers.SGD(RATE))


def squared_errors(state, batch):
    return tf.square(state.model(batch["x"])[:, 0] - batch["y"])


def one_step(strategy, state, weight, loss_fn=squared_errors):
    """Run one minimize over the four examples, shared out over the replicas; return each replica's packed metrics."""
    replicas = strategy.num_replicas_in_sync
    batch = {"x": X, "y": Y, "weight": np.asarray(weight, np.float32)}

    def share(context):
        size = len(Y) // replicas
        begin = context.replica_id_in_sync_group * size
        return {name: tf.constant(value[begin : begin + size]) for name, value in batch.items()}

    def step(batch):
        result = minimize(lambda b: loss_fn(state, b), batch, state.optimizer, state.model.trainable_variables)
        assert all(metric.reduced for metric in result.values())
        return metrics.pack(result)

    shared = strategy.experimental_distribute_values_from_function(share)
    out = tf.function(lambda b: strategy.run(step, args=(b,)), autograph=False)(shared)
    return [value.numpy() for value in strategy.experimental_local_results(out)]


def kernels(strategy, state):
    return [v.numpy()[:, 0] for v in strategy.experimental_local_results(state.model.layers[0].kernel.value)]


@pytest.mark.parametrize("weight", [[1, 1, 1, 1], [1, 1, 1, 0], [0.5, 2, 0, 3], [0, 0, 0, 4]])
def test_the_update_is_the_gradient_of_the_global_weighted_mean(strategy, weight):
    state = linear_state(strategy)
    packed = one_step(strategy, state, weight)
    errors, weight = X @ START - Y, np.array(weight)
    gradient = (2 * weight * errors) @ X / weight.sum()
    for kernel in kernels(strategy, state):
        np.testing.assert_allclose(kernel, START - RATE * gradient, rtol=1e-6)
    for replica in packed:
        np.testing.assert_allclose(replica, [(weight * errors**2).sum(), weight.sum()], rtol=1e-6)


def test_a_penalty_added_to_the_losses_counts_once_on_any_number_of_replicas(strategy):
    def penalized(state, batch):
        return squared_errors(state, batch) + 0.5 * tf.reduce_sum(state.model.layers[0].kernel.value ** 2)

    state, weight = linear_state(strategy), np.array([1, 1, 1, 0])
    one_step(strategy, state, weight, penalized)
    gradient = (2 * weight * (X @ START - Y)) @ X / weight.sum() + START
    for kernel in kernels(strategy, state):
        np.testing.assert_allclose(kernel, START - RATE * gradient, rtol=1e-6)


def test_a_batch_of_nothing_but_padding_has_no_gradient(strategy):
    state = linear_state(strategy)
    one_step(strategy, state, [0, 0, 0, 0])
    for kernel in kernels(strategy, state):
        np.testing.assert_array_equal(kernel, START)


def test_metrics_returned_beside_the_losses_are_reduced_too(strategy):
    def with_metric(state, batch):
        return squared_errors(state, batch), {"y": mean(batch["y"], batch["weight"])}

    for replica in one_step(strategy, linear_state(strategy), [1, 1, 1, 1], with_metric):
        np.testing.assert_allclose(replica[2:], [Y.sum(), 4])


def test_keras_does_not_reduce_a_second_time(mirrored):
    # This pins the private hook that minimize sets: a second sum would double the update on two replicas.
    for optimizer in (lambda: keras.optimizers.SGD(RATE, momentum=0.9), lambda: keras.optimizers.Adam(RATE)):
        results = []
        for strategy in (tf.distribute.get_strategy(), mirrored):
            state = linear_state(strategy, optimizer)
            one_step(strategy, state, [1, 1, 1, 1])
            one_step(strategy, state, [1, 1, 1, 1])
            results.extend(kernels(strategy, state))
        for kernel in results[1:]:
            np.testing.assert_allclose(kernel, results[0], rtol=1e-5)


def test_one_exchange_carries_gradients_denominator_and_metrics(mirrored):
    with mirrored.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(4), keras.layers.Dense(1)])
        state = State(model=model, optimizer=keras.optimizers.Adam(RATE))

    def step():
        batch = {"x": tf.constant(X), "y": tf.constant(Y), "weight": tf.ones([4])}

        def loss(batch):
            return squared_errors(state, batch), {"y": mean(batch["y"], batch["weight"])}

        minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    assert exchanges_of(tf.function(lambda: mirrored.run(step), autograph=False)) == ["AddN"]


def test_embedding_gradients_stay_exact(strategy):
    ids = np.array([0, 2, 2, 1])
    with strategy.scope():
        table = keras.layers.Embedding(3, 2, embeddings_initializer="ones")
        table.build()
        state = State(table=table, optimizer=keras.optimizers.SGD(1.0))
    replicas = strategy.num_replicas_in_sync

    def share(context):
        begin = context.replica_id_in_sync_group * (4 // replicas)
        return tf.constant(ids[begin : begin + 4 // replicas])

    def step(ids):
        batch = {"ids": ids, "weight": tf.ones([4 // replicas])}
        loss = minimize(
            lambda b: tf.reduce_sum(state.table(b["ids"]), axis=1), batch, state.optimizer, table.trainable_variables
        )
        return loss["loss"].parts[0]

    shared = strategy.experimental_distribute_values_from_function(share)
    tf.function(lambda ids: strategy.run(step, args=(ids,)), autograph=False)(shared)
    for local in strategy.experimental_local_results(table.embeddings.value):
        np.testing.assert_allclose(local.numpy(), [[0.75] * 2, [0.75] * 2, [0.5] * 2])  # 1 - count / 4


@pytest.mark.parametrize(
    "reduced",
    [
        lambda state, batch: tf.reduce_mean(squared_errors(state, batch)),
        lambda state, batch: keras.losses.MeanSquaredError()(batch["y"], state.model(batch["x"])[:, 0]),
        lambda state, batch: (squared_errors(state, batch), {}, {}),
    ],
)
def test_a_loss_that_is_not_one_an_example_is_refused_with_the_reason(reduced):
    strategy = tf.distribute.get_strategy()
    with pytest.raises(
        UsageError, match="expected one loss an example, shape \\(4,\\), because distloop itself divides"
    ):
        one_step(strategy, linear_state(strategy), [1, 1, 1, 1], reduced)


def test_a_keras_loss_scale_optimizer_is_refused():
    strategy = tf.distribute.get_strategy()
    state = linear_state(strategy, lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(RATE)))
    with pytest.raises(UsageError, match="a Keras LossScaleOptimizer decides on the gradients of one replica"):
        one_step(strategy, state, [1, 1, 1, 1])


def test_a_loss_with_an_axis_too_many_is_refused_with_the_cure():
    def with_axis(state, batch):
        return tf.square(state.model(batch["x"]) - batch["y"][:, None])

    strategy = tf.distribute.get_strategy()
    with pytest.raises(UsageError, match=r"a loss of shape \(4, 1\); expected shape \(4,\): drop the last axis with"):
        one_step(strategy, linear_state(strategy), [1, 1, 1, 1], with_axis)


def test_a_metric_cannot_take_the_place_of_the_loss():
    def with_loss(state, batch):
        return squared_errors(state, batch), {"loss": mean(batch["y"], batch["weight"])}

    strategy = tf.distribute.get_strategy()
    with pytest.raises(UsageError, match="a metric named 'loss'; that name is minimize's own"):
        one_step(strategy, linear_state(strategy), [1, 1, 1, 1], with_loss)


def test_a_variable_that_keras_cannot_update_is_refused():
    batch = {"y": tf.constant(Y), "weight": tf.ones([4])}
    with pytest.raises(UsageError, match="minimize got variables that are not Keras variables"):
        minimize(lambda b: b["y"], batch, keras.optimizers.SGD(RATE), [tf.Variable(1.0)])


def test_a_loss_of_no_variable_is_refused():
    strategy = tf.distribute.get_strategy()
    with pytest.raises(UsageError, match="depends on none of the variables"):
        one_step(strategy, linear_state(strategy), [1, 1, 1, 1], lambda _, batch: tf.square(batch["y"]))
