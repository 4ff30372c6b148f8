"""State that replicas must agree on (statistics), and state in which they must differ (seeds of dropout)."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from distloop import State, minimize
from distloop.checkpoint import Checkpointer
from distloop.steps import separate_seeds
from distloop.task import named_variables
from distloop.updates import UpdateRule, set_rule
from tests import in_workers
from tests.shared_step import run_step

SIZE, STEPS = 8, 3
X = np.arange(SIZE, dtype=np.float32)[:, None] ** 2  # the replicas' parts have different means


def model_of(layer):
    return keras.Sequential([keras.Input([1]), layer, keras.layers.Dense(1)])


def local_values(strategy, variable):
    return [value.numpy() for value in strategy.experimental_local_results(variable)]


def trained_statistics(strategy, weight=None, micro_batches=1):
    """Train BatchNormalization without synchronization; return its moving statistics of every local replica."""
    with strategy.scope():
        keras.utils.set_random_seed(1)
        layer = keras.layers.BatchNormalization(momentum=0.5)
        state = State(model=model_of(layer), optimizer=keras.optimizers.SGD(0.1))
    set_rule(state.optimizer, UpdateRule(micro_batches=micro_batches))

    def step(batch):
        variables = state.model.trainable_variables
        return minimize(lambda b: state.model(b["x"], training=True)[:, 0], batch, state.optimizer, variables)

    for _ in range(STEPS):
        run_step(strategy, step, {"x": X, **({"weight": weight} if weight is not None else {})})
    return state, layer


def expected_statistics(parts):
    """Return the moving mean and variance by NumPy: each update moves halfway to the mean over `parts` of the input."""
    mean, variance = 0.0, 1.0
    for _ in range(STEPS):
        mean = 0.5 * mean + 0.5 * np.mean([part.mean() for part in parts])
        variance = 0.5 * variance + 0.5 * np.mean([part.var() for part in parts])
    return mean, variance


def test_statistics_are_the_mean_over_replicas_on_every_replica_and_in_a_checkpoint(strategy, tmp_path):
    state, layer = trained_statistics(strategy)
    mean, variance = expected_statistics(np.split(X, strategy.num_replicas_in_sync))
    with Checkpointer(epath.Path(tmp_path), state, writes=True) as checkpointer:
        checkpointer.save({})
    layer.moving_mean.assign([0.0])
    checkpointer.restore()
    for local in local_values(strategy, layer.moving_mean.value):
        np.testing.assert_allclose(local, [mean], rtol=1e-6)
    for local in local_values(strategy, layer.moving_variance.value):
        np.testing.assert_allclose(local, [variance], rtol=1e-5)


def test_a_replica_with_nothing_but_padding_has_no_say_in_the_statistics(mirrored):
    _, layer = trained_statistics(mirrored, weight=np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32))
    mean, _ = expected_statistics([X[:4]])
    for local in local_values(mirrored, layer.moving_mean.value):
        np.testing.assert_allclose(local, [mean], rtol=1e-6)


def test_a_micro_batch_of_nothing_but_padding_has_no_say_in_the_statistics(strategy):
    weight = np.array([1, 1, 0, 0, 1, 1, 0, 0] if strategy.num_replicas_in_sync == 2 else [1] * 4 + [0] * 4, np.float32)
    _, layer = trained_statistics(strategy, weight, micro_batches=2)
    mean, _ = expected_statistics([X[:2], X[4:6]] if strategy.num_replicas_in_sync == 2 else [X[:4]])
    for local in local_values(strategy, layer.moving_mean.value):
        np.testing.assert_allclose(local, [mean], rtol=1e-6)


def statistics_in_worker(strategy):
    """Train, save by the first worker, spoil, and restore on every worker."""
    state, layer = trained_statistics(strategy)
    folder = epath.Path(sys.argv[2]).parent / "checkpoints"
    with Checkpointer(folder, state, writes=strategy.cluster_resolver.task_id == 0) as checkpointer:
        checkpointer.save({})
    strategy.reduce("SUM", tf.constant(0), axis=None)  # it is there, on all workers
    layer.moving_mean.assign([0.0])
    checkpointer.restore()
    return {"mean": local_values(strategy, layer.moving_mean.value), **masks(strategy)}


def masks(strategy, folder=None, restore_after=None):
    """Return the dropout masks `[steps, 64]` of each local replica; with `restore_after`, of a run resumed there."""
    keras.utils.clear_session()
    with strategy.scope():
        keras.utils.set_random_seed(1)
        seen = tf.Variable(tf.zeros([64]), trainable=False)
        dropout = keras.layers.Dropout(0.5)
        state = State(model=model_of(dropout), optimizer=keras.optimizers.SGD(0.1), seen=seen)
    if restore_after is not None:
        Checkpointer(epath.Path(folder), state, writes=False).restore()
    separate_seeds(strategy, state)

    def step(batch):
        def loss(b):
            state.seen.assign(dropout(tf.ones([64]), training=True))
            return state.model(b["x"], training=False)[:, 0]

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    found = []
    for _ in range(STEPS if restore_after is None else STEPS - restore_after):
        run_step(strategy, step, {"x": X})
        state.step.assign_add(1)
        found.append(local_values(strategy, named_variables(state)["seen"]))
        if folder is not None and restore_after is None:
            with Checkpointer(epath.Path(folder), state, writes=True) as checkpointer:
                checkpointer.save({})
            if len(found) == 1:
                break
    return {f"mask{replica}": np.stack(column) for replica, column in enumerate(zip(*found, strict=True))}


def test_dropout_masks_differ_between_replicas_and_steps_and_repeat(strategy, tmp_path):
    first, second = masks(strategy), masks(strategy)
    for replica in first:
        np.testing.assert_array_equal(first[replica], second[replica])
        assert len({mask.tobytes() for mask in first[replica]}) == STEPS
        assert 0.2 < np.mean(first[replica] == 0) < 0.8
    assert len({mask.tobytes() for column in first.values() for mask in column}) == STEPS * len(first)


def test_dropout_masks_go_on_after_a_resume_on_every_replica(strategy, tmp_path):
    whole, begun = masks(strategy), masks(strategy, tmp_path)
    resumed = masks(strategy, tmp_path, restore_after=1)
    for replica in whole:
        np.testing.assert_array_equal(whole[replica][:1], begun[replica])
        np.testing.assert_array_equal(whole[replica][1:], resumed[replica])


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return in_workers.run("tests.test_replica_state:statistics_in_worker", tmp_path_factory.mktemp("w") / "out")


def test_restored_statistics_are_the_mean_over_workers_on_every_worker(workers):
    mean, _ = expected_statistics(np.split(X, 2))
    for worker in workers:
        np.testing.assert_allclose(worker["mean"], [[mean]], rtol=1e-6)


def test_dropout_masks_differ_between_workers(workers, mirrored):
    one, other = workers
    in_process = masks(mirrored)
    np.testing.assert_array_equal(one["mask0"], in_process["mask0"])  # a replica draws by its global number
    np.testing.assert_array_equal(other["mask0"], in_process["mask1"])
