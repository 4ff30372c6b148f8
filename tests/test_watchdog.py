"""A worker that hangs is found, named, and all start again; one that is only slow is left alone."""

import re
from typing import NamedTuple

import pytest

from distloop.launcher.beacon import Sighting
from distloop.launcher.watchdog import Watchdog
from tests import harness
from tests.run_files import differences

COMMAND = (
    *("-m", "distloop", "--task=tests.hang_task:make_task", "--global_batch_size=4", "--train_steps=12"),
    *("--steps_per_call=6", "--eval_every_steps=6", "--checkpoint_every_steps=3"),
)
HANGS = "HANGS"


def supervised(folder, limits, **environment):
    """Run the task in two workers under a supervisor; return the exit code and what it said."""
    command = harness.supervised(*COMMAND, f"--workdir={folder}", workers=2, flags=[f"--hang_timeout={limits}"])
    code, _, err = harness.run(*command, fresh=True, limit_secs=300, **environment)
    return code, err


def first_alarm(*parts, others_elsewhere=False):
    """Return when a watchdog finds a hang, by simulated clock: `parts` are (phase, waits, seconds without progress)."""
    watchdog, now, began = Watchdog({}), 1000.0, 1000.0
    watchdog.start(others_elsewhere=others_elsewhere)
    for progress, (phase, waits, seconds) in enumerate(parts):
        seen = Sighting(phase, 0, changed=now, progress=progress, waits=waits)
        end = now + seconds
        while now < end:
            if watchdog.look({0: seen}, now):
                return now - began
            now += 1
    return None


@pytest.mark.parametrize(
    "parts",
    [
        [("import", False, 100_000)],  # another program
        [("setup", False, 3000)],  # data that is prepared
        [("compile", False, 3000), ("step", False, 600)],
        [("compile", False, 150), ("step", False, 150), ("step", False, 500)],  # slow steps, known from the first
        [("save", False, 3000)],
        [("action", False, 3000)],
    ],
    ids=lambda parts: parts[-1][0],
)
def test_what_shows_no_progress_though_it_is_healthy_is_left_alone(parts):
    assert first_alarm(*parts) is None


def test_who_waits_for_hosts_that_no_one_here_sees_lets_them_compile():
    assert first_alarm(("step", True, 1000), others_elsewhere=True) is None
    assert first_alarm(("step", True, 1000)) == 121


def test_a_job_that_was_held_and_goes_on_is_no_hang():
    watchdog = Watchdog({"step": 60})
    watchdog.start(others_elsewhere=False)
    before = {0: Sighting("step", 3, changed=1000.0)}
    assert not watchdog.look(before, 1001.0)
    assert not watchdog.look(before, 5000.0)  # the supervisor was held, too, and looks before the worker goes on
    assert next(second for second in range(5000, 5070) if watchdog.look(before, second)) == 5061


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    for code, out, err in harness.run_workers([*COMMAND, f"--workdir={folder}"], workers=2):
        assert code == 0, out + err
    return folder


class Hang(NamedTuple):
    """One attempt: how and from which step on worker 1 hangs, its limit, and in what phase and function it is found."""

    kind: str
    step: int
    limit: int
    phase: str
    function: str


@pytest.mark.parametrize(
    "hangs",
    [
        pytest.param([Hang("input", 5, 5, "input", "hang_asleep")], id="input"),
        pytest.param(
            [
                Hang("trace", 1, 20, "compile", "hang_asleep"),
                Hang("eval", 6, 3, "eval", "hang_asleep"),
                Hang("lock", 8, 3, "step", "hang_in_my_lock"),
                Hang("busy", 9, 3, "step", "hang_in_my_loop"),
            ],
            id="others",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_that_hangs_is_named_with_its_place_and_all_start_again(tmp_path, clean, hangs):
    folder = tmp_path / "run"
    chosen = [f"{hang.kind}:{hang.step}:1:{tmp_path / hang.kind}" for hang in hangs]
    limits = {f"{hang.phase}:{hang.limit}" for hang in hangs}
    code, err = supervised(folder, ",".join(limits), HANGS=" ".join(chosen))
    assert code == 0, err
    *attempts, _ = err.split("all workers start again")
    for number, (hang, said) in enumerate(zip(hangs, attempts, strict=True)):
        found = re.search(r"rank (\d) on \S+ in (\w+) after step (\d+): hung: no progress for (\d+) s", said)
        assert found, err
        assert (found[1], found[2]) == ("1", hang.phase)
        if hang.phase == "step":
            assert int(found[3]) == hang.step - 1
        # The limit counts from the last move of anyone, and the other worker compiles on for some seconds.
        assert hang.limit <= int(found[4]) <= hang.limit + (10 if hang.phase == "compile" else 2)
        assert f"in {hang.function}" in said.partition("hung: no progress")[0]
        for rank in (0, 1):  # each log has the stacks of its worker
            log = folder / f"logs/rank_{rank}/attempt_{number}.log"
            assert "most recent call first" in log.read_text()
    assert differences(folder, clean) == []


@pytest.mark.slow
def test_a_slow_compilation_slow_steps_and_a_long_evaluation_are_no_hang(tmp_path):
    """Three batches a worker and evaluation of 0.7 s; each limit is shorter than what it is the limit of takes."""
    code, err = supervised(tmp_path / "run", "step:3,eval:2", HANGS=f"slow:0:0:{tmp_path / 'never'}")
    assert (code, err) == (0, "")
    assert [path.name for path in (tmp_path / "run/logs/rank_1").glob("*.log")] == ["attempt_0.log"]
