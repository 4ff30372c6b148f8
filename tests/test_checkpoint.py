import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State
from distloop.checkpoint import KEEP, Checkpointer
from distloop.config import UsageError
from distloop.task import named_variables
from tests import toy

TASK = toy.make_task(RunConfig(seed=0))
HOST = {"record": {"examples": 3}, "open_epoch": [1.5, 2.0]}


def trained(strategy, steps):
    state, _, call = toy.compiled(strategy, TASK)
    if steps:
        call(steps)
    return state, call


def test_everything_comes_back_by_name_and_training_goes_on_to_the_same_bits(strategy, tmp_path):
    state, call = trained(strategy, 3)
    Checkpointer(tmp_path, state, writes=True).save(HOST)
    saved = toy.to_numpy(state)
    assert any("seed_generator_state" in name for name in saved)  # dropout's masks go on, too
    assert any("momentum" in name for name in saved)
    call(3)  # steps 4 to 6, from the fourth batch on

    other, other_call = trained(strategy, 3)
    for variable in named_variables(other).values():
        variable.assign(tf.zeros_like(variable))
    assert Checkpointer(tmp_path, other, writes=True).restore() == HOST
    for name, value in toy.to_numpy(other).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
    other_call(3)
    expected = toy.to_numpy(state)
    for name, variable in named_variables(other).items():
        for local in strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(local.numpy(), expected[name], err_msg=name)


def test_an_incomplete_checkpoint_is_never_restored(tmp_path):
    state, call = trained(tf.distribute.get_strategy(), 2)
    checkpointer = Checkpointer(tmp_path, state, writes=True)
    checkpointer.save(HOST)
    (tmp_path / "step_00000009.partial").mkdir()
    (tmp_path / "step_00000009.partial/state.index").write_text("cut short")
    call(1)
    assert checkpointer.restore() == HOST
    assert int(state.step.numpy()) == 2


def test_the_newest_are_kept_and_the_others_removed(tmp_path):
    state, call = trained(tf.distribute.get_strategy(), 0)
    checkpointer = Checkpointer(tmp_path, state, writes=True)
    for _ in range(KEEP + 2):
        call(1)
        checkpointer.save(HOST)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (3, 4, 5)]
    checkpointer.restore()
    assert int(state.step.numpy()) == 5


def test_the_newest_is_the_one_with_the_highest_step_of_any_length(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 0)
    checkpointer = Checkpointer(tmp_path, state, writes=True)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        state.step.assign(step)
        checkpointer.save(HOST)
    state.step.assign(0)
    checkpointer.restore()
    assert int(state.step.numpy()) == 100_000_001


def test_a_worker_that_does_not_write_writes_nothing(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    Checkpointer(tmp_path, state, writes=False).save(HOST)
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_restores_nothing(tmp_path):
    assert (
        Checkpointer(tmp_path / "checkpoints", trained(tf.distribute.get_strategy(), 0)[0], writes=True).restore()
        is None
    )


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    Checkpointer(tmp_path, state, writes=True).save(HOST)
    keras.utils.clear_session()
    wider = keras.Sequential([keras.Input([3]), keras.layers.Dense(5), keras.layers.Dense(1)], name="net")
    other = State(model=wider, optimizer=keras.optimizers.Adam())
    with pytest.raises(UsageError) as refusal:
        Checkpointer(tmp_path, other, writes=True).restore()
    assert "is of another model" in str(refusal.value)
    assert "'model/net/dense/bias' (shape [4] there, shape [5] here)" in str(refusal.value)
