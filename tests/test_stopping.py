"""Stopping well: SIGTERM at any moment ends all workers after one step, with a checkpoint to go on from exactly."""

import functools
import json
import os
import signal
import time

import numpy as np
import pytest

from distloop.cluster import from_tf_config
from distloop.lifecycle import Lifecycle
from tests import harness, in_workers
from tests.run_files import last_logged
from tests.test_command_line import checkpoint, without_timing

RUN = (
    *("-m", "distloop", "--task=tests.stop_task:make_task", "--global_batch_size=4", "--train_steps=20"),
    *("--steps_per_call=5", "--eval_every_steps=6", "--checkpoint_every_steps=8"),
)


def stopped_step(folder):
    newest = max((folder / "checkpoints").iterdir())
    return int(newest.name.removeprefix("step_"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the function that returns the run nobody stopped, for a number of workers."""

    @functools.cache
    def run(workers):
        folder = tmp_path_factory.mktemp("whole") / "run"
        for code, out, err in harness.run_workers([*RUN, f"--workdir={folder}"], workers=workers):
            assert code == 0, out + err
        return folder

    return run


# Where each may stop: within a call of 5 steps, anywhere, in place of an evaluation, anywhere after a save.
STOPS = {"step:2": {3, 4}, "input:7": range(5, 12), "eval:12": {12}, "save:16": range(17, 20)}


@pytest.mark.parametrize(
    ("workers", "asked"),
    [
        (1, ["step:2:0", "input:7:0", "eval:12:0", "save:16:0"]),
        (2, ["step:2:1", "input:7:all"]),
        pytest.param(2, ["step:2:all", "input:7:1", "eval:12:1", "save:16:0"], marks=pytest.mark.slow),
    ],
)
def test_a_stop_at_any_moment_is_agreed_and_the_resumed_run_is_the_one_nobody_stopped(tmp_path, whole, workers, asked):
    for stop in asked:
        ended = harness.run_workers([*RUN, f"--workdir={tmp_path / 'run'}"], workers=workers, STOP=stop)
        for code, out, err in ended:
            assert code == 143, (stop, out + err)
            assert "as asked, with a checkpoint; the same command goes on from there" in err
        assert stopped_step(tmp_path / "run") in STOPS[stop.rpartition(":")[0]]
    for code, out, err in harness.run_workers([*RUN, f"--workdir={tmp_path / 'run'}"], workers=workers):
        assert code == 0, out + err
    expected = checkpoint(whole(workers))
    for name, value in checkpoint(tmp_path / "run").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert without_timing(tmp_path / "run") == without_timing(whole(workers))


def test_a_run_on_several_replicas_ends_while_its_pipeline_is_in_a_python_function(tmp_path):
    mirrored = [*RUN, "--strategy=mirrored", "--replicas=2", f"--workdir={tmp_path / 'run'}"]
    code, out, err = harness.run(*mirrored, limit_secs=60, STOP="input:7:0")
    assert code == 143, out + err


def started(folder, *flags):
    """Start a long run and return its process once it has trained a step."""
    process = harness.start(
        ["-m", "distloop", "--task=tests.own_task:good", "--global_batch_size=4", *flags, f"--workdir={folder}"]
    )
    harness.until(lambda: last_logged(folder), process, limit_secs=120)
    return process


def test_an_interrupt_stops_with_a_checkpoint_and_a_second_one_at_once(tmp_path):
    process = started(tmp_path / "one", "--train_steps=100000000")
    os.kill(process.pid, signal.SIGINT)
    code, _, err = harness.finish(process, limit_secs=60)
    assert code == 143
    assert "SIGINT: all workers stop after this step, with a checkpoint." in err
    assert stopped_step(tmp_path / "one") > 0

    process = started(tmp_path / "two", "--task=tests.stop_task:slow", "--steps_per_call=1", "--train_steps=100")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)  # two signals that are pending at once are one to the kernel
    os.kill(process.pid, signal.SIGINT)
    code, _, err = harness.finish(process, limit_secs=5)  # a step takes 20 s
    assert code == 130
    assert "stopped at once, in step" in err
    assert not (tmp_path / "two/checkpoints").exists()


def errors_of(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "errors").iterdir())]


def test_the_error_of_one_worker_is_recorded_as_the_cause_and_those_of_the_others_as_its_consequence(tmp_path):
    ended = harness.run_workers(
        ["-m", "distloop", "--task=tests.own_task:fails_on_worker_1", "--global_batch_size=4", "--steps_per_call=1"]
        + [f"--workdir={tmp_path / 'run'}"],
        workers=2,
    )
    assert [code for code, _, _ in ended] == [138, 1], ended
    cause, consequence = sorted(errors_of(tmp_path / "run"), key=lambda record: record["collateral"])
    assert (cause["worker"], cause["collateral"], cause["phase"]) == (1, False, "step")
    assert "no more disks" in cause["message"]
    assert "own_task.py" in cause["traceback"]
    assert cause["step"] == 4
    assert (consequence["worker"], consequence["collateral"]) == (0, True)
    assert "another worker has gone" in ended[0][2]
    assert "no more disks" in ended[1][2]


def test_a_run_that_is_stopped_before_its_first_step_ends_at_once(tmp_path):
    process = harness.start(
        ["-m", "distloop", "--task=tests.stop_task:stops_in_build", f"--workdir={tmp_path / 'run'}"]
    )
    code, _, err = harness.finish(process, limit_secs=60)
    assert code == 143
    assert "stopped at once, in setup" in err
    assert not (tmp_path / "run").exists()


def meet_at_the_end(strategy):
    """Come to the end, worker 0 later than worker 1; return when each came and when it could go."""
    workers = from_tf_config(os.environ["TF_CONFIG"])
    if workers.index == 0:
        time.sleep(2)  # a long last write
    came = time.monotonic()
    Lifecycle(workers).leave_together()
    return {"came": np.array(came), "left": np.array(time.monotonic())}


def test_a_worker_that_is_done_early_waits_for_the_others(tmp_path):
    chief, early = in_workers.run("tests.test_stopping:meet_at_the_end", tmp_path / "met")
    assert early["came"] < chief["came"] <= early["left"]  # one clock for both processes
