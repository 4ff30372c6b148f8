"""Stopping well: SIGTERM at any moment ends all workers after one step, with a checkpoint to go on from exactly."""

import numpy as np
import pytest

from tests import harness
from tests.test_command_line import checkpoint, without_timing

RUN = (
    *("-m", "distloop", "--task=tests.stop_task:make_task", "--global_batch_size=4", "--train_steps=20"),
    *("--steps_per_call=5", "--eval_every_steps=6", "--checkpoint_every_steps=8"),
)


def stopped_step(folder):
    newest = max((folder / "checkpoints").iterdir())
    return int(newest.name.removeprefix("step_"))


@pytest.mark.parametrize(("workers", "asked"), [(1, ["0"]), (2, ["1", "all"])])
def test_a_stop_at_any_moment_is_agreed_and_the_resumed_run_is_the_one_nobody_stopped(tmp_path, workers, asked):
    for code, out, err in harness.run_workers([*RUN, f"--workdir={tmp_path / 'whole'}"], workers=workers):
        assert code == 0, out + err
    # Where each may stop: within a call of 5 steps, anywhere, in place of an evaluation, anywhere after a save.
    stops = [("step:2", {3, 4}), ("input:7", range(5, 12)), ("eval:12", {12}), ("save:16", range(17, 20))]
    for number, (moment, where) in enumerate(stops):
        ended = harness.run_workers(
            [*RUN, f"--workdir={tmp_path / 'run'}"], workers=workers, STOP=f"{moment}:{asked[number % len(asked)]}"
        )
        for code, out, err in ended:
            assert code == 143, (moment, out + err)
            assert "as asked, with a checkpoint; the same command goes on from there" in err
        assert stopped_step(tmp_path / "run") in where
    for code, out, err in harness.run_workers([*RUN, f"--workdir={tmp_path / 'run'}"], workers=workers):
        assert code == 0, out + err
    expected = checkpoint(tmp_path / "whole")
    for name, value in checkpoint(tmp_path / "run").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert without_timing(tmp_path / "run") == without_timing(tmp_path / "whole")
