"""A worker that hangs is found, named, and all start again; one that is only slow is left alone."""

import re

import pytest

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
    code, _, err = harness.run(*command, fresh=True, limit_secs=120, **environment)
    return code, err


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    assert supervised(folder, "") == (0, "")
    return folder


@pytest.mark.parametrize(
    ("kind", "step", "rank", "limits", "phase", "function"),
    [
        pytest.param("lock", 8, 1, "step:3", "step", "hang_in_my_lock", marks=pytest.mark.slow),
        pytest.param("sleep", 8, 0, "step:3", "step", "hang_asleep", marks=pytest.mark.slow),
        pytest.param("busy", 8, 1, "step:3", "step", "hang_in_my_loop", marks=pytest.mark.slow),
        ("input", 5, 1, "input:5", "input", "hang_asleep"),
        pytest.param("eval", 6, 1, "eval:3", "eval", "hang_asleep", marks=pytest.mark.slow),
        pytest.param("trace", 1, 1, "compile:20", "compile", "hang_asleep", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_hangs_is_named_with_its_place_and_all_start_again(
    tmp_path, clean, kind, step, rank, limits, phase, function
):
    folder = tmp_path / "run"
    code, err = supervised(folder, limits, HANGS=f"{kind}:{step}:{rank}:{tmp_path / 'hung'}")
    assert code == 0, err
    found = re.search(r"rank (\d) on \S+ in (\w+) after step (\d+): hung: no progress for (\d+) s", err)
    assert found, err
    assert (int(found[1]), found[2]) == (rank, phase)
    if phase == "step":
        assert int(found[3]) == step - 1
    limit = float(limits.rpartition(":")[2])
    assert limit <= int(found[4]) <= limit + 2
    assert f"in {function}" in err.partition("hung: no progress")[0]
    for other in (0, 1):  # each log has the stacks of its worker
        assert "most recent call first" in (folder / f"logs/rank_{other}/attempt_0.log").read_text()
    assert differences(folder, clean) == []


@pytest.mark.slow
def test_a_slow_compilation_slow_steps_and_a_long_evaluation_are_no_hang(tmp_path):
    """Three batches a worker and evaluation of 0.7 s; each limit is shorter than what it is the limit of takes."""
    code, err = supervised(tmp_path / "run", "step:3,eval:2", HANGS="slow:0:0:")
    assert (code, err) == (0, "")
    assert [path.name for path in (tmp_path / "run/logs/rank_1").glob("*.log")] == ["attempt_0.log"]
