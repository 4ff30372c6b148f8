"""SIGTERM to a supervisor, or to it and all its workers: one checkpoint, one step, and the run goes on from there."""

import os
import signal

import numpy as np
import pytest

from tests import harness
from tests.harness import until
from tests.test_command_line import checkpoint, without_timing
from tests.test_stopping import RUN, stopped_step


def supervised(folder, *flags, **environment):
    command = harness.supervised(*RUN, f"--workdir={folder}", workers=2, flags=flags)
    return harness.run(*command, fresh=True, limit_secs=120, **environment)


@pytest.mark.slow
def test_a_stop_at_any_moment_ends_with_a_checkpoint_and_the_resumed_run_is_the_one_nobody_stopped(tmp_path):
    for code, out, err in harness.run_workers([*RUN, f"--workdir={tmp_path / 'whole'}"], workers=2):
        assert code == 0, out + err
    last = 0  # a stop after the last step is one before its evaluation, which the resumed run does
    for moment, whom, latest in (
        ("step:2:1", "group", 6),
        ("input:7:1", "supervisor", 12),
        ("eval:12:0", "group", 14),
        ("save:16:0", "supervisor", 20),
    ):
        code, out, err = supervised(tmp_path / "run", STOP=moment, STOP_WHOM=whom)
        # The request takes some tenths of a second: the last may find a run that has just finished.
        assert code == 143 or (code == 0 and moment.startswith("save")), (moment, out + err)
        before, last = last, stopped_step(tmp_path / "run")
        assert before <= last <= latest, moment  # asked before the first step of an attempt, it saves nothing
    code, out, err = supervised(tmp_path / "run")
    assert code == 0, out + err
    expected = checkpoint(tmp_path / "whole")
    for name, value in checkpoint(tmp_path / "run").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert without_timing(tmp_path / "run") == without_timing(tmp_path / "whole")


def test_a_worker_that_waits_for_its_peers_to_come_up_is_stopped_at_once(tmp_path):
    """Worker 1 never comes, and TensorFlow lets worker 0 hear nothing."""
    waits = (
        "import os, sys, time\nfrom distloop.cluster import from_tf_config\n"
        "if from_tf_config(os.environ['TF_CONFIG']).index: time.sleep(600)\n"
        "from distloop.flags import train_main\nsys.argv = ['train', *sys.argv[1:]]\ntrain_main()"
    )
    command = harness.supervised("-c", waits, *RUN[2:], f"--workdir={tmp_path / 'run'}", workers=2)
    process = harness.start(command, fresh=True, TF_CPP_MIN_LOG_LEVEL="0")
    try:
        rank_0 = tmp_path / "run/logs/rank_0/attempt_0.log"
        until(lambda: rank_0.exists() and "Waiting for" in rank_0.read_text(), process, limit_secs=90)
        os.kill(process.pid, signal.SIGTERM)
        code, out, err = harness.finish(process, limit_secs=10)
    finally:
        if process.poll() is None:
            harness.kill(process)
    assert code == 143, out + err
