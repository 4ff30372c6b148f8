import contextlib
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from distloop import RunConfig, State, checkpoint_files
from distloop.checkpoint import Checkpointer
from distloop.errors import StorageError, UsageError
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
    saved(checkpointer_of(state, tmp_path))
    values = toy.to_numpy(state)
    assert any("seed_generator_state" in name for name in values)  # dropout's masks go on, too
    assert any("momentum" in name for name in values)
    call(3)  # steps 4 to 6, from the fourth batch on

    other, other_call = trained(strategy, 3)
    for variable in named_variables(other).values():
        variable.assign(tf.zeros_like(variable))
    assert checkpointer_of(other, tmp_path).restore() == HOST
    for name, value in toy.to_numpy(other).items():
        np.testing.assert_array_equal(value, values[name], err_msg=name)
    other_call(3)
    expected = toy.to_numpy(state)
    for name, variable in named_variables(other).items():
        for local in strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(local.numpy(), expected[name], err_msg=name)


def checkpointer_of(state, folder, **settings):
    return Checkpointer(epath.Path(folder), state, writes=True, **settings)


def saved(checkpointer, **host_state):
    """Save and wait, so that the files can be looked at."""
    checkpointer.save(host_state or HOST)
    checkpointer.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_incomplete_checkpoint_is_never_restored_and_goes_with_the_next_save(tmp_path):
    state, call = trained(tf.distribute.get_strategy(), 2)
    checkpointer = checkpointer_of(state, tmp_path)
    saved(checkpointer)
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000009")
    (tmp_path / "step_00000009/checkpoint.json").unlink()  # as if killed before the index was written
    call(1)
    assert checkpointer.restore() == HOST
    assert int(state.step.numpy()) == 2
    call(1)
    saved(checkpointer)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_the_newest_are_kept_and_the_best_and_the_others_removed(tmp_path):
    state, call = trained(tf.distribute.get_strategy(), 0)
    checkpointer = checkpointer_of(state, tmp_path, keep=2)
    for best_step in (1, 1, 1, 4, 4, 4):
        call(1)
        checkpointer.save(HOST, best_step=best_step)
        checkpointer.wait()
        if int(state.step.numpy()) == 3:
            assert names(tmp_path) == [f"step_{step:08d}" for step in (1, 2, 3)]
    assert names(tmp_path) == [f"step_{step:08d}" for step in (4, 5, 6)]
    checkpointer.restore()
    assert int(state.step.numpy()) == 6
    checkpointer.restore(4)
    assert int(state.step.numpy()) == 4


def test_the_newest_is_the_one_with_the_highest_step_of_any_length(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 0)
    checkpointer = checkpointer_of(state, tmp_path)
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):
        state.step.assign(step)
        checkpointer.save(HOST)
    checkpointer.wait()
    state.step.assign(0)
    checkpointer.restore()
    assert int(state.step.numpy()) == 100_000_001


def test_a_second_save_of_a_step_has_the_last_word_about_the_host_state(tmp_path):
    state, call = trained(tf.distribute.get_strategy(), 1)
    checkpointer = checkpointer_of(state, tmp_path)
    saved(checkpointer, evaluated=False)
    values = checkpoint_files.read(epath.Path(tmp_path / "step_00000001")).values
    call(1)
    assert checkpointer.restore() == {"evaluated": False}
    saved(checkpointer, evaluated=True)
    found = checkpoint_files.read(epath.Path(tmp_path / "step_00000001"))
    assert found.host_state == {"evaluated": True}
    for name, value in values.items():
        np.testing.assert_array_equal(found.values[name], value, err_msg=name)


def test_a_second_save_of_a_step_keeps_the_seeds_that_an_evaluation_has_moved_meanwhile(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    checkpointer = checkpointer_of(state, tmp_path)
    saved(checkpointer)
    (seed,) = [v for name, v in named_variables(state).items() if name.endswith("seed_generator_state")]
    seed.assign(seed + 3)
    expected = seed.numpy()
    saved(checkpointer, other="host state")
    seed.assign(tf.zeros_like(seed))
    assert checkpointer.restore() == {"other": "host state"}
    np.testing.assert_array_equal(seed.numpy(), expected)


def test_what_changes_after_a_save_is_not_in_the_file(tmp_path, monkeypatch, mirrored):
    state, call = trained(mirrored, 2)
    checkpointer = checkpointer_of(state, tmp_path)
    release, write = threading.Event(), checkpoint_files.write
    monkeypatch.setattr(checkpoint_files, "write", lambda *arguments: (release.wait(60), write(*arguments)))
    before, host_state = toy.to_numpy(state), {"record": {"best": [1.0]}}
    checkpointer.save(host_state)
    call(3)  # while nothing is written yet
    for variable in named_variables(state).values():
        variable.assign(tf.zeros_like(variable))
    host_state["record"]["best"].append(2.0)
    release.set()
    checkpointer.wait()
    found = checkpoint_files.read(epath.Path(tmp_path / "step_00000002"))
    assert found.host_state == {"record": {"best": [1.0]}}
    assert set(found.values) == set(before)
    for name, value in before.items():
        np.testing.assert_array_equal(found.values[name], value, err_msg=name)


def test_a_slow_disk_does_not_hold_up_the_training(tmp_path, monkeypatch):
    state, call = trained(tf.distribute.get_strategy(), 1)
    checkpointer = checkpointer_of(state, tmp_path)
    sync = os.fsync

    def slow(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.endswith("data-00000-of-00001"):
            time.sleep(2)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    checkpointer.save(HOST)
    call(5)
    assert not (tmp_path / "step_00000001/checkpoint.json").exists()  # it is still being written
    assert checkpointer.timings()["checkpoint_stall_seconds"] < 0.2
    checkpointer.wait()
    assert checkpointer.timings()["checkpoint_write_seconds"] > 2
    checkpointer.restore()
    assert int(state.step.numpy()) == 1


def damage_of(kind, path):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *[("checkpoint.json", kind) for kind in ("truncated", "flipped")],  # without it, it is no checkpoint
        *[("state.index", kind) for kind in ("truncated", "flipped", "missing")],
        *[("state.data-00000-of-00001", kind) for kind in ("truncated", "flipped", "missing")],
    ],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys, file, kind):
    state, call = trained(tf.distribute.get_strategy(), 0)
    checkpointer = checkpointer_of(state, tmp_path)
    for number in (1, 2):
        call(1)
        saved(checkpointer, number=number)
    expected = checkpoint_files.read(epath.Path(tmp_path / "step_00000002")).values
    damage_of(kind, tmp_path / "step_00000002" / file)
    assert checkpointer.restore() == {"number": 1}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distloop: the checkpoint {tmp_path / 'step_00000002'} is damaged (")
    assert line.endswith("); trying the one before it.")
    assert int(state.step.numpy()) == 1
    state.step.assign(2)
    saved(checkpointer, number=3)  # takes the place of the damaged one
    assert checkpointer.restore() == {"number": 3}
    assert set(expected) == set(checkpoint_files.read(epath.Path(tmp_path / "step_00000002")).values)


def test_if_all_are_damaged_the_run_does_not_silently_start_over(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    checkpointer = checkpointer_of(state, tmp_path)
    saved(checkpointer)
    damage_of("flipped", tmp_path / "step_00000001/state.index")
    before = toy.to_numpy(state)
    with pytest.raises(UsageError, match="has no sound checkpoint; put one back from a copy, or give a new workdir"):
        checkpointer.restore()
    for name, value in toy.to_numpy(state).items():
        np.testing.assert_array_equal(value, before[name])


@contextlib.contextmanager
def files_of_at_most(limit_bytes):
    """Let the kernel refuse longer files, as it does when a disk is full: in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoints_before_and_says_so(tmp_path, capsys):
    state = State(weights=tf.Variable(tf.zeros([100_000])))
    checkpointer = checkpointer_of(state, tmp_path)
    saved(checkpointer)
    state.step.assign(1)
    with files_of_at_most(100_000):
        checkpointer.save(HOST)  # raises nothing: training goes on
        with pytest.raises(StorageError, match=r"step_00000001 could not be written .* Make room, and the same"):
            checkpointer.wait()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"step_00000001 could not be written \([^{]*; File too large\); training goes on", line)
    assert names(tmp_path) == ["step_00000000"]  # and nothing half-written takes room
    assert checkpointer.restore() == HOST
    state.step.assign(2)
    saved(checkpointer)  # there is room again
    assert names(tmp_path) == ["step_00000000", "step_00000002"]


def test_an_error_on_its_way_is_not_hidden_by_a_failed_write(tmp_path):
    state = State(weights=tf.Variable(tf.zeros([100_000])))
    checkpointer = checkpointer_of(state, tmp_path)

    def fail():
        with checkpointer:
            checkpointer.save(HOST)
            raise KeyError

    with files_of_at_most(100_000), pytest.raises(KeyError):
        fail()


def test_a_worker_that_does_not_write_writes_nothing(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    with Checkpointer(epath.Path(tmp_path), state, writes=False) as checkpointer:
        checkpointer.save(HOST)
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_restores_nothing(tmp_path):
    assert checkpointer_of(trained(tf.distribute.get_strategy(), 0)[0], tmp_path / "checkpoints").restore() is None


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path):
    state, _ = trained(tf.distribute.get_strategy(), 1)
    saved(checkpointer_of(state, tmp_path))
    keras.utils.clear_session()
    layers = [keras.layers.Dense(5), keras.layers.Dense(5), keras.layers.Dense(1)]
    other = State(model=keras.Sequential([keras.Input([3]), *layers], name="net"), optimizer=keras.optimizers.SGD())
    with pytest.raises(UsageError) as refusal:
        checkpointer_of(other, tmp_path).restore()
    first, *lines = str(refusal.value).splitlines()
    assert "is of another model; give a new workdir" in first
    assert lines[0].startswith("  missing there (")
    assert "model/net/dense_2/bias [1] float32" in lines[0]
    assert lines[1].startswith("  unexpected there (")
    assert "and 1 more" in lines[1]
    assert lines[2].startswith(
        "  of another shape or dtype (4): model/net/dense/kernel [3, 4] float32 there, [3, 5] fl"
    )
