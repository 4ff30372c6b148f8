"""What a worker and its supervisor tell each other: where it is, that it shall stop, where it hangs, why it ended."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import tensorflow as tf

from distloop import Pipeline, RunConfig, Stopped, train
from distloop.launcher.beacon import VARIABLE as BEACON
from distloop.launcher.beacon import Beacon
from tests import harness, toy

TRAIN = ("-m", "distloop", "--global_batch_size=4", "--train_steps=6", "--steps_per_call=2")


@pytest.fixture
def beacon(monkeypatch):
    beacon = Beacon.create()
    monkeypatch.setenv(BEACON, str(beacon.descriptor))
    yield beacon
    beacon.close()


@pytest.mark.parametrize("number", ["", "9999", "-1", None], ids=["empty", "closed", "impossible", "another file"])
def test_a_program_in_between_that_keeps_the_descriptor_to_itself_leaves_no_beacon(tmp_path, number):
    other = tmp_path / "other"
    other.write_bytes(b"x" * 4096)
    with other.open("r+b") as file:
        assert Beacon.inherited({BEACON: number if number is not None else str(file.fileno())}) is None
    assert other.read_bytes() == b"x" * 4096


@contextlib.contextmanager
def watched(beacon):
    """Look at the beacon all the time; yield the list of what is seen, each once."""
    seen, ended = [], threading.Event()

    def look():
        while not ended.wait(0.02):
            sighting = beacon.read()
            if not seen or seen[-1] != sighting:
                seen.append(sighting)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join(10)
        assert not thread.is_alive()


def slow_at(moment):
    """Return the toy task, each batch of training (`input`) or of evaluation (`eval`) or each `step` 0.3 s late."""
    task = toy.make_task(RunConfig())

    def late(example, now):
        def wait(y):
            time.sleep(0.3 if now == moment else 0)
            return y

        y = tf.ensure_shape(tf.numpy_function(wait, [example["y"]], tf.float32), example["y"].shape)
        return {**example, "y": y}

    return dataclasses.replace(
        task,
        train_data=lambda: Pipeline(toy.DATA, map=lambda example: late(example, "input")),
        train_step=lambda state, batch: task.train_step(state, late(batch, "step")),
        eval_step=lambda state, batch: task.eval_step(state, late(batch, "eval")),  # pyright: ignore[reportOptionalCall]
    )


@pytest.mark.parametrize("moment", ["input", "step", "eval"])
def test_the_supervisor_sees_each_step_within_one_call_of_many(tmp_path, beacon, moment):
    with watched(beacon) as seen:
        train(
            slow_at(moment),
            RunConfig(workdir=str(tmp_path / "run"), strategy="default", global_batch_size=4, train_steps=6),
        )
    steps = [sighting.step for sighting in seen]
    assert steps == sorted(steps)
    assert "compile" in {sighting.phase for sighting in seen}
    assert beacon.read()[:2] == ("end", 6)
    here = [sighting for sighting in seen if sighting.phase == moment]
    if moment == "eval":  # of 3 batches, after each epoch of 3 steps
        assert {sighting.step for sighting in here} == {3, 6}
        assert len({sighting.progress for sighting in here}) >= 4
    else:
        assert len({sighting.step for sighting in here}) >= 2  # of the other steps' batches some are early
    assert not any(sighting.waits for sighting in seen[:-1])
    changes = [sighting.changed for sighting in seen]
    assert changes == sorted(changes)


def test_a_request_of_the_supervisor_stops_the_run_with_a_checkpoint(tmp_path, beacon):
    phases = set()

    def ask(progress):
        phases.add(beacon.read().phase)
        if progress.step == 4:
            beacon.ask_to_stop()
        if progress.step > 4:
            time.sleep(0.02)

    config = RunConfig(
        workdir=str(tmp_path / "run"), strategy="default", global_batch_size=4, train_steps=10**6, steps_per_call=1
    )
    with pytest.raises(Stopped, match="with a checkpoint"):
        train(toy.make_task(config), config, extra_actions=[ask])
    (newest, *_) = sorted((tmp_path / "run/checkpoints").iterdir(), reverse=True)
    assert phases == {"action"}  # which may take its time
    assert 4 <= int(newest.name.removeprefix("step_")) < 100


def test_a_worker_that_is_asked_before_its_first_step_ends_at_once(tmp_path, beacon):
    code = (
        "import os\nfrom distloop.flags import train_main\n"
        f"os.environ['{BEACON}'] = str(os.open('/proc/{os.getpid()}/fd/{beacon.descriptor}', os.O_RDWR))\n"
        "train_main()"
    )
    process = harness.start(["-c", code, "--task=tests.own_task:hangs_in_build", f"--workdir={tmp_path / 'run'}"])
    harness.until(lambda: "building" in process.output()[0], process)
    assert beacon.read().phase == "setup"
    beacon.ask_to_stop()
    code, _, err = harness.finish(process, limit_secs=5)
    assert code == 143
    assert "stopped at once, in setup" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "code", "kind", "message", "phase"),
    [
        (["--epochs=many"], 64, "UsageError", "--epochs", "setup"),
        (["--task=tests.own_task:no_data"], 64, "UsageError", "train_data", "setup"),
        (["--task=tests.own_task:fails_at_step_4"], 1, "UnknownError", "no more disks", "step"),
        (["--task=tests.own_task:diverges"], 65, "NotFiniteError", "stopped being finite", "step"),
    ],
)
def test_every_error_is_handed_to_the_supervisor(tmp_path, flags, code, kind, message, phase):
    file = tmp_path / "error.json"
    ended = harness.run(*TRAIN, f"--workdir={tmp_path / 'run'}", *flags, DISTLOOP_ERROR_FILE=str(file))
    assert ended[0] == code, ended
    record = json.loads(file.read_text())
    assert (record["exit_code"], record["type"], record["phase"], record["collateral"]) == (code, kind, phase, False)
    assert message in record["message"]
    assert record["message"] in record["traceback"]
    recorded = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("errors/*")]
    assert recorded == ([{"worker": 0, **record}] if phase == "step" else [])
    assert list(tmp_path.glob("*.tmp")) == []


def with_tensorflow(folder, text):
    """Start a run whose TensorFlow is a module of this text."""
    (folder / "tensorflow.py").write_text(text)
    command = [*TRAIN, "--task=tests.own_task:good", f"--workdir={folder / 'run'}"]
    return harness.start(
        command, fresh=True, PYTHONPATH=f"{folder}:{harness.ROOT}", DISTLOOP_ERROR_FILE=str(folder / "error.json")
    )


def test_an_error_from_before_the_run_is_handed_over_too(tmp_path):
    code, _, err = harness.finish(with_tensorflow(tmp_path, "raise ImportError('libcuda is broken')"))
    record = json.loads((tmp_path / "error.json").read_text())
    assert (code, record["exit_code"], record["type"], record["phase"]) == (1, 1, "ImportError", "setup")
    assert "libcuda is broken" in err


def test_a_worker_that_hangs_while_tensorflow_loads_shows_its_stacks(tmp_path):
    process = with_tensorflow(tmp_path, "import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    try:
        harness.until(lambda: "loading" in process.output()[0], process)
        os.kill(process.pid, signal.SIGUSR1)
        harness.until(lambda: "tensorflow.py" in process.output()[1], process)
        assert process.poll() is None
    finally:
        harness.kill(process)
