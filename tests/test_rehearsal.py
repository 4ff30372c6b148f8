"""Faults on request: each kind does what it says, in the step it is asked for, and the run goes on as if without."""

import os
import signal
from pathlib import Path

import pytest

from distloop.launcher.processes import is_stopped
from tests import harness, run_files

RUN = (
    *("-m", "distloop", "--task=tests.dying:everything", "--global_batch_size=8", "--train_steps=12"),
    *("--steps_per_call=2", "--eval_every_steps=6", "--checkpoint_every_steps=4"),
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    code, out, err = harness.run(*RUN, f"--workdir={folder}")
    assert code == 0, out + err
    return folder


def with_fault(folder: Path, fault: str) -> harness.Process:
    return harness.start([*RUN, f"--workdir={folder}"], DISTLOOP_FAULT=fault)


@pytest.mark.parametrize(
    ("fault", "code", "message", "logged"),
    [
        ("10:kill", -signal.SIGKILL, "", 8),
        ("10:raise", 1, "DISTLOOP_FAULT=10:raise: a rehearsal", 8),
        ("10:exit0", 0, "", 8),
        ("10:nan", 65, "stopped being finite at step 10", 10),
        ("10:enospc", 1, "No space left on device", 8),
        ("10:torn_save", -signal.SIGKILL, "", None),  # by a thread, while the steps go on
    ],
)
def test_a_fault_comes_in_its_step_and_the_same_command_goes_on_as_without(
    tmp_path, clean, fault, code, message, logged
):
    folder = tmp_path / "run"
    found, _, err = harness.finish(with_fault(folder, fault))
    assert found == code, err
    assert message in err
    assert logged in (None, run_files.last_logged(folder))
    if fault.endswith("torn_save"):
        torn = run_files.checkpoints(folder)[-1]
        assert (torn / "state.index").exists()
        assert not run_files.complete(torn)
    code, out, err = harness.run(*RUN, f"--workdir={folder}")
    assert code == 0, out + err
    assert run_files.differences(folder, clean) == []


@pytest.mark.parametrize("kind", ["stop", "hang"])
def test_a_worker_that_is_to_stand_still_does_so_in_its_step(tmp_path, clean, kind):
    folder = tmp_path / "run"
    process = with_fault(folder, f"10:{kind}")
    try:
        harness.until(
            lambda: is_stopped(process.pid) if kind == "stop" else run_files.last_logged(folder) == 8, process
        )
        if kind == "stop":
            os.kill(process.pid, signal.SIGCONT)  # it goes on as if nothing had been
            assert process.wait(60) == 0
            assert run_files.differences(folder, clean) == []
        else:
            with pytest.raises(TimeoutError):
                process.wait(1)
    finally:
        if process.poll() is None:
            harness.kill(process)
    assert run_files.last_logged(folder) == (12 if kind == "stop" else 8)


def test_a_fault_that_cannot_be_read_is_refused_with_the_kinds(tmp_path):
    for wrong in ("3:explode", "kill", "0:kill", ""):
        code, _, err = harness.run(*RUN, f"--workdir={tmp_path / 'run'}", DISTLOOP_FAULT=wrong)
        assert code == 64
        assert f"DISTLOOP_FAULT has {wrong!r}; expected STEP:KIND, such as 20:kill, with one of kill, stop" in err
        assert not (tmp_path / "run").exists()
