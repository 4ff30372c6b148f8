"""Sharded optimizer slots (ZeRO-1): the numbers of unsharded ones, in 1/N of their room, under the same names."""

import dataclasses
import shutil
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State, export, minimize
from distloop.errors import UsageError
from distloop.guard import first_not_finite
from distloop.task import named_variables
from distloop.updates import prepare
from tests import in_workers, toy
from tests.columns import COLUMNS, run_processes
from tests.run_files import checkpoints, state
from tests.shared_step import exchanges, run_steps

GENERATOR = np.random.default_rng(3)
STEPS = 4
X = GENERATOR.normal(size=[STEPS, 8, 3]).astype(np.float32)
IDS = GENERATOR.integers(0, 5, size=[STEPS, 8])
Y = GENERATOR.normal(size=[STEPS, 8]).astype(np.float32)
ADAM = keras.optimizers.Adam


def decaying():
    optimizer = keras.optimizers.AdamW(0.02, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


RULES = {
    "SGD": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam, schedule": lambda: ADAM(keras.optimizers.schedules.CosineDecay(0.1, decay_steps=3), amsgrad=True),
    "AdamW, no decay of biases": decaying,
    "RMSprop": lambda: keras.optimizers.RMSprop(0.02, momentum=0.5, centered=True),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Adamax": lambda: keras.optimizers.Adamax(0.02),
    "Lion": lambda: keras.optimizers.Lion(0.01, weight_decay=0.1),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1),
}


def make_state(strategy, make_optimizer, **settings):
    """Return a model whose variables have 10 to 63 entries, no multiples of 2, under a rule of updates."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        inputs = {"id": keras.Input([], dtype="int32", name="id"), "x": keras.Input([3], name="x")}
        rows = keras.layers.Embedding(5, 4)(inputs["id"])
        hidden = keras.layers.Concatenate()([rows, inputs["x"]])
        hidden = keras.layers.Dense(9, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.8))(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden), name="net")
        state = State(model=model, optimizer=make_optimizer())
        prepare(state, RunConfig(**settings))
    return state


def step_of(state):
    def step(batch):
        def loss(b):
            return tf.square(tf.cast(state.model({"id": b["id"], "x": b["x"]})[:, 0], tf.float32) - b["y"])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return step


def batch(step):
    return {"id": IDS[step], "x": X[step], "y": Y[step]}


def trained(strategy, make_optimizer, **settings):
    state = make_state(strategy, make_optimizer, **settings)
    run_steps(strategy, step_of(state), map(batch, range(STEPS)))
    return state


def assert_same_numbers(state, other, tolerance=1e-6):
    ours, theirs = named_variables(state), named_variables(other)
    assert [(name, v.shape, v.dtype) for name, v in ours.items()] == [
        (name, v.shape, v.dtype) for name, v in theirs.items()
    ]
    for name, variable in ours.items():
        np.testing.assert_allclose(variable.numpy(), theirs[name].numpy(), rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_weights_and_slots_are_those_of_the_unsharded_update(mirrored, rule):
    sharded = trained(mirrored, RULES[rule], shard_optimizer=True)
    assert_same_numbers(sharded, trained(mirrored, RULES[rule]))
    for variable in sharded.model.trainable_variables:
        first, second = mirrored.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize(
    "settings",
    [
        dict(clip_global_norm=0.1, gradient_norm=True, micro_batches=2, ema_momentum=0.9),
        dict(jit_compile=True),
        dict(precision="mixed_float16", initial_loss_scale=3e38, loss_scale_backoff_factor=1e-30),  # one skipped
    ],
    ids=str,
)
def test_what_else_an_update_does_goes_on(mirrored, settings):
    plain = trained(mirrored, decaying, **settings)
    assert_same_numbers(trained(mirrored, decaying, shard_optimizer=True, **settings), plain)
    if "precision" in settings:
        assert named_variables(plain)["loss_scale/optimizer/skipped"].numpy() == 1


def test_each_replica_holds_its_part_of_the_slots(mirrored):
    state = make_state(mirrored, ADAM, shard_optimizer=True)
    weights = sum(variable.shape.num_elements() for variable in state.model.trainable_variables)
    slots = state.sharded.values()
    for replica in range(2):
        held = sum(slot.local_pieces[replica].shape.num_elements() for slot in slots)
        assert held == pytest.approx(2 * weights / 2, abs=len(slots))  # at most one entry of padding a slot
    sharded = {id(slot.pieces) for slot in slots}
    whole = [v.path for v in state.optimizer.variables if id(v.value) not in sharded]
    assert whole == ["adam/iteration", "adam/learning_rate"]


def test_the_new_weights_are_put_together_without_a_collective_in_one_process(mirrored):
    state = make_state(mirrored, ADAM, shard_optimizer=True)
    plain = make_state(mirrored, ADAM)
    found, expected = (exchanges(mirrored, step_of(each), batch(0)) for each in (state, plain))
    assert found == expected


def test_a_slot_that_is_not_finite_on_another_replica_is_named(mirrored):
    state = make_state(mirrored, ADAM, shard_optimizer=True)
    assert first_not_finite(state) is None
    name, slot = next((name, v) for name, v in named_variables(state).items() if name.endswith("velocity"))
    value = slot.numpy()
    value.flat[-1] = np.inf
    slot.assign(value)
    assert first_not_finite(state) == name


@pytest.mark.parametrize(
    "optimizer",
    [keras.optimizers.Lamb, keras.optimizers.Adafactor, keras.optimizers.Nadam, type("Own", (ADAM,), {})],
)
def test_an_optimizer_that_may_be_no_elementwise_one_is_refused(mirrored, optimizer):
    with pytest.raises(UsageError, match=f"got a {optimizer.__name__}, .* expected one of Keras's SGD, Adam, AdamW"):
        make_state(mirrored, optimizer, shard_optimizer=True)


def in_worker(strategy):
    """Return what a worker holds after a training, sharded or not, and what it sees of a slot of another worker."""
    found = {}
    for kind, settings in {"sharded": dict(shard_optimizer=True), "plain": {}}.items():
        state = trained(strategy, decaying, **settings)
        found.update({f"{kind}:{name}": v.numpy() for name, v in named_variables(state).items()})
        found[f"collectives:{kind}"] = exchanges(strategy, step_of(state), batch(0))
        if kind == "sharded":
            name, slot = next((name, v) for name, v in named_variables(state).items() if name.endswith("velocity"))
            value = slot.numpy()
            value.flat[-1] = np.nan  # the last replica's
            found["finite"] = [first_not_finite(state) is None]
            slot.assign(value)
            found["not finite"] = [first_not_finite(state) == name]
    return found


@pytest.mark.parametrize("replicas", [1, 2])
def test_workers_hold_the_numbers_of_the_unsharded_update_and_gather_once_a_step(tmp_path, replicas):
    workers = in_workers.run("tests.test_sharding:in_worker", tmp_path / "out", replicas=replicas)
    for arrays in workers:
        names = [key.partition(":")[2] for key in arrays if key.startswith("plain:")]
        for name in names:
            ours, theirs = arrays[f"sharded:{name}"], arrays[f"plain:{name}"]
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(ours, workers[0][f"sharded:{name}"], err_msg=name)
        assert arrays["finite"]
        assert arrays["not finite"]
        more = [*arrays["collectives:plain"], *["CollectiveGatherV2"] * replicas]
        assert sorted(arrays["collectives:sharded"]) == sorted(more)


def make_task(config):
    """Return the toy without what draws by replica."""

    def build():
        keras.utils.set_random_seed(config.seed)
        layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
        return State(model=keras.Sequential([keras.Input([3]), *layers], name="net"), optimizer=decaying())

    return dataclasses.replace(toy.make_task(config), build=build)


def run(column, folder, *, sharded):
    settings = dict(
        global_batch_size=4, train_steps=6, checkpoint_every_steps=3, ema_momentum=0.9, clip_global_norm=0.5
    )
    settings |= dict(shard_optimizer=sharded, workdir=folder, **COLUMNS[column].settings)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    run_processes(column, ["-m", "distloop", "--task=tests.test_sharding:make_task", *flags])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train to the end, unsharded and sharded."""
    folders = {sharded: tmp_path_factory.mktemp("run") / "whole" for sharded in (False, True)}
    run("one device", folders[False], sharded=False)
    run("two processes of two replicas", folders[True], sharded=True)
    return folders


def assert_same_checkpoints(folder, other, tolerance=1e-6):
    ours, theirs = state(folder), state(other)
    assert [(name, v.shape, v.dtype) for name, v in ours.items()] == [
        (name, v.shape, v.dtype) for name, v in theirs.items()
    ]
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was_sharded", "column", "sharded", "tolerance"),
    [
        (True, "two processes of two replicas", True, 0.0),
        (True, "mirrored 4", False, 1e-6),
        (True, "mirrored 2", True, 1e-6),
        (True, "one device", True, 1e-6),
        (False, "two processes", True, 1e-6),
    ],
)
def test_a_run_goes_on_with_other_replicas_sharded_or_not(runs, tmp_path, was_sharded, column, sharded, tolerance):
    whole, folder = runs[was_sharded], tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoints(folder)[-1])
    (folder / "summary.json").unlink()  # as if killed after the last checkpoint but one
    run(column, folder, sharded=sharded)
    assert_same_checkpoints(folder, whole, tolerance)


@pytest.mark.slow
def test_checkpoint_and_export_do_not_show_that_slots_were_sharded(runs, tmp_path):
    assert_same_checkpoints(runs[True], runs[False])
    export(str(runs[True]), str(tmp_path / "model.keras"), format="keras")
    saved = state(runs[True])
    model: Any = keras.models.load_model(tmp_path / "model.keras")
    for variable in model.variables:
        np.testing.assert_array_equal(variable.numpy(), saved[f"model/net/{variable.path}"])
