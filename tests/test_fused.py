"""One pass over the weights makes the weights and slots that Keras's own update makes, in float64."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import State, fused, minimize
from tests.shared_step import run_steps

IDS = [np.array([0, 2, 2, 1]), np.array([3, 2, 0, 0]), np.array([1, 1, 1, 1])]


class Derived(keras.optimizers.Adam):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, learning_rate * gradient)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "adam": lambda: keras.optimizers.Adam(0.01, beta_1=0.8, epsilon=1e-3),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.5)),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "derived": lambda: Derived(0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
}


def table(optimizer, dtype="float32"):
    """Return a state with a table `[4, 3]` and an optimizer that has been built for it."""
    layer = keras.layers.Embedding(4, 3, dtype=dtype)
    layer.build()
    layer.embeddings.assign(np.linspace(-1.0, 1.0, 12).reshape(4, 3))
    return State(layer=layer, optimizer=optimizer)


def by_keras(name):
    """Return the weights and the rest after a step on each of `IDS`, dense and in float64, by Keras alone."""
    state = table(OPTIMIZERS[name](), "float64")
    (variable,) = state.layer.trainable_variables
    for ids in IDS:
        gradient = np.zeros([4, 3])
        np.add.at(gradient, ids, 2 * variable.numpy()[ids] / len(ids))
        state.optimizer.apply([tf.constant(gradient)], [variable])
    return [v.numpy() for v in (variable, *state.optimizer.variables)]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_slots_are_those_of_keras(strategy, name, sparse):
    with strategy.scope():
        state = table(OPTIMIZERS[name]())
    (variable,) = state.layer.trainable_variables

    def step(batch):
        def loss(batch):
            rows = state.layer(batch["id"]) if sparse else tf.one_hot(batch["id"], 4) @ variable.value
            return tf.reduce_sum(tf.square(rows), axis=1)

        return minimize(loss, batch, state.optimizer, [variable])

    run_steps(strategy, step, [{"id": ids} for ids in IDS])
    weights, *slots = by_keras(name)
    for local in strategy.experimental_local_results(variable.value):
        np.testing.assert_allclose(local.numpy(), weights, rtol=1e-6, atol=1e-6)
    for slot, expected in zip(state.optimizer.variables, slots, strict=True):
        for local in strategy.experimental_local_results(slot.value):
            np.testing.assert_allclose(local.numpy(), expected, rtol=2e-5, atol=1e-7)


def trained_by_adam(gradients, *, own_kernel):
    """Return the weights, float32, after a step with each gradient, by the kernel or by Keras."""
    state = table(keras.optimizers.Adam(0.01, beta_2=0.9999))
    (variable,) = state.layer.trainable_variables
    if own_kernel:
        update = functools.partial(fused.update, state.optimizer)
        state.optimizer._all_reduce_sum_gradients = lambda pairs: [pair for pair in pairs if not update(*pair)]
    step = tf.function(lambda gradient: state.optimizer.apply([gradient], [variable]), autograph=False)
    for gradient in gradients:
        step(tf.constant(gradient))
    return variable.numpy()


def test_the_weights_of_adam_stay_those_of_keras_in_float32_where_beta_2_is_near_1():
    gradients = np.random.default_rng(0).normal(size=[100, 4, 3]).astype(np.float32)
    found, expected = (trained_by_adam(gradients, own_kernel=own_kernel) for own_kernel in (True, False))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # by the kernel as it is, 3e-5


@pytest.mark.parametrize(
    ("name", "kernel"), [("momentum", "ResourceApplyKerasMomentum"), ("adamw", "ResourceApplyAdam")]
)
def test_each_replica_updates_a_variable_by_one_kernel(mirrored, name, kernel):
    with mirrored.scope():
        state = table(OPTIMIZERS[name]())

    def step():
        batch = {"id": tf.constant(IDS[0]), "weight": tf.ones([4])}
        minimize(lambda b: state.layer(b["id"])[:, 0], batch, state.optimizer, state.layer.trainable_variables)

    graph = tf.function(lambda: mirrored.run(step), autograph=False).get_concrete_function().graph
    assert [op.type for op in graph.get_operations()].count(kernel) == 2
