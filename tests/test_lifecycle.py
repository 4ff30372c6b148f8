"""What a run says of itself: how it waits for input, what it is made of, whose error ended it."""

import json
import time

import numpy as np
import pytest
import tensorflow as tf

from distloop import Pipeline, RunConfig, train
from distloop.cluster import Cluster
from distloop.lifecycle import Lifecycle, is_collateral
from tests import harness, toy
from tests.test_command_line import checkpoint, without_timing


def rows(folder, split="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def task_with(source):
    task = toy.make_task(RunConfig(seed=0))
    return task.__class__(task.build, task.train_step, lambda: source)


@pytest.mark.parametrize("strategy", ["default", "mirrored"])
def test_a_pipeline_that_starves_the_step_is_visible_as_input_wait(tmp_path, strategy, mirrored):
    def slow(row):
        time.sleep(0.03)  # 0.06 s a batch in two threads, and a step takes a few ms
        return np.float32(row)

    def decode(example):
        zero = 0 * tf.ensure_shape(tf.numpy_function(slow, [example["y"]], tf.float32), [])
        return {**example, "y": example["y"] + zero}

    settings = dict(
        strategy=strategy, replicas=2 if strategy == "mirrored" else None, global_batch_size=4, train_steps=40
    )
    for name, source in {"slow": Pipeline(toy.DATA, map=decode), "fast": toy.DATA}.items():
        train(task_with(source), RunConfig(workdir=str(tmp_path / name), steps_per_call=20, **settings))
    # The first call holds the tracing of what runs lazily; between calls of one step the pipeline catches up.
    found = ([row["input_wait"] for row in rows(tmp_path / name)[1:]] for name in ("slow", "fast"))
    slow_wait, fast_wait = map(np.mean, found)
    # How much is a matter of the machine: about 0.9 where no other process makes the steps longer.
    assert 0 <= fast_wait < slow_wait <= 1


def test_the_fingerprint_of_a_run_changes_with_all_that_matters(tmp_path, mirrored):
    def fingerprint(name, source=toy.DATA, **settings):
        settings = dict(strategy="default", global_batch_size=4, train_steps=1) | settings
        train(task_with(source), RunConfig(workdir=str(tmp_path / name), **settings))
        return json.loads((tmp_path / name / "config.json").read_text())["fingerprint"]

    first = fingerprint("first")
    assert fingerprint("same", steps_per_call=7) == first  # shapes nothing but the logs
    others = [
        fingerprint("seed", seed=1),
        fingerprint("batch", global_batch_size=5),
        fingerprint("average", ema_momentum=0.9),
        fingerprint("replicas", strategy="mirrored", replicas=2),
        fingerprint("data", {name: array[::-1] for name, array in toy.DATA.items()}),
    ]
    assert len({first, *others}) == 6


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path, capsys):
    settings = RunConfig(workdir=str(tmp_path / "run"), strategy="default", global_batch_size=4, train_steps=4)
    train(task_with(toy.DATA), settings)
    (tmp_path / "run/summary.json").unlink()  # as if killed just before its end
    capsys.readouterr()
    train(task_with({name: array[::-1] for name, array in toy.DATA.items()}), settings)
    assert "resumed with other data than before" in " ".join(capsys.readouterr().out.split())


def test_deterministic_operations_give_the_same_bits_and_can_be_asked_for_by_a_flag(tmp_path):
    command = ("-m", "distloop", "--task=tests.own_task:good", "--global_batch_size=4", "--train_steps=5")
    for name in ("one", "two"):
        code, out, err = harness.run(
            *command, "--deterministic", "--replicas=2", f"--workdir={tmp_path / name}", TF_CPP_MIN_LOG_LEVEL="3"
        )
        assert code == 0, out + err
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert {name: value.tobytes() for name, value in one.items()} == {n: v.tobytes() for n, v in two.items()}
    assert without_timing(tmp_path / "one") == without_timing(tmp_path / "two")
    assert "input_wait" not in rows(tmp_path / "one")[0]  # TensorFlow refuses its clock: the flag has reached it


def test_an_error_that_cannot_be_recorded_is_still_the_error(tmp_path, capsys):
    (tmp_path / "errors").write_text("no folder")
    with pytest.raises(RuntimeError, match="the true one"), Lifecycle(Cluster()).recording_errors(tmp_path):
        raise RuntimeError("the true one")
    assert "the error could not be recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "collateral"),
    [
        ("Collective ops is aborted by: recvmsg:Connection reset by peer", True),
        ("Barrier failed because a task has stopped sending heartbeats", True),
        ("indices[3] = 12 is not in [0, 10)", False),
    ],
)
def test_an_error_that_only_follows_from_a_lost_peer_is_told_apart(text, collateral):
    error = tf.errors.UnavailableError(None, None, text)
    assert is_collateral(error) is collateral
    wrapped = RuntimeError("while training")
    wrapped.__cause__ = error
    assert is_collateral(wrapped) is collateral
    assert not is_collateral(ValueError(text))
    of_storage = OSError(text)
    of_storage.__cause__ = error
    assert not is_collateral(of_storage)
