"""Evaluating checkpoints by a command: one, or each as it appears, with the numbers of the run itself."""

import json
import os
import shutil
import signal

import pytest

from tests import harness
from tests.test_writers import events

RUN = (
    *("-m", "distloop", "--task=tests.own_task:good", "--global_batch_size=4", "--train_steps=12", "--seed=3"),
    *(
        "--eval_every_steps=4",
        "--checkpoint_every_steps=4",
        "--best_metric=loss",
        "--best_mode=max",
        "--ema_momentum=0.9",
    ),
)


def rows(path):
    """Return by step what the rows of the evaluations in a metrics.jsonl say."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line.pop("step"): line for line in lines if line["split"] == "eval"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    code, out, err = harness.run(*RUN, f"--workdir={folder}")
    assert code == 0, out + err
    return folder


def evaluated(*flags):
    """Return what the command says in its last line."""
    code, out, err = harness.run("-m", "launch.evaluate", *flags)
    assert code == 0, out + err
    assert "loss" in out.splitlines()[-3]  # the table
    return json.loads(out.splitlines()[-1])


def test_each_checkpoint_evaluates_to_the_numbers_of_the_run_itself(run):
    own = {step: row["loss"] for step, row in rows(run / "metrics.jsonl").items()}
    best = json.loads((run / "summary.json").read_text())["best"]["step"]
    assert best == max(own, key=own.get)
    for checkpoint, step in {"newest": 12, "best": best, "8": 8}.items():
        assert evaluated(f"--workdir={run}", f"--checkpoint={checkpoint}") == {"step": step, "loss": own[step]}


def test_other_settings_can_be_given(run):
    found = evaluated(f"--workdir={run}", "--replicas=2", "--global_batch_size=6")
    assert found["loss"] == pytest.approx(rows(run / "metrics.jsonl")[12]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "workdir is not given; expected the folder of a run"),
        (["--workdir=/nowhere"], "workdir /nowhere has no config.json; expected the folder of a run"),
        (["--workdir={run}", "--checkpoint=oldest"], "checkpoint is 'oldest'; expected newest, best or a step"),
        (["--workdir={run}", "--checkpoint=5"], "has no sound checkpoint of step 5"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_sentence(run, flags, message):
    code, _, err = harness.run("-m", "launch.evaluate", *(flag.format(run=run) for flag in flags))
    assert code == 64
    assert message in err


def followed(folder, *flags, **environment):
    return harness.start(["-m", "launch.evaluate", f"--workdir={folder}", "--follow", *flags], **environment)


def test_a_follower_evaluates_what_appears_and_ends_with_the_run(tmp_path, run):
    """The run is played: its files come one after the other, the checkpoint of step 8 while no one follows."""
    folder = tmp_path / "run"
    process = followed(folder)
    results = folder / "evaluator/metrics.jsonl"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("summary.json", "step_*"))
    shutil.copytree(run / "checkpoints/step_00000004", folder / "checkpoints/step_00000004")
    harness.until(lambda: results.exists() and 4 in rows(results), process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = harness.finish(process, limit_secs=5)
    assert code == 143, err

    (folder / "checkpoints/step_00000004/state.index").unlink()  # it is never read again
    process = followed(folder)
    shutil.copytree(run / "checkpoints/step_00000008", folder / "checkpoints/step_00000008")
    shutil.copytree(run / "checkpoints/step_00000012", folder / "checkpoints/step_00000012")
    (folder / "summary.json").write_bytes((run / "summary.json").read_bytes())
    code, out, err = harness.finish(process, limit_secs=60)
    assert code == 0, out + err
    found = rows(results)
    assert found.keys() in ({4, 12}, {4, 8, 12})  # it may see that of step 8 before that of step 12
    own = rows(run / "metrics.jsonl")
    assert found == {step: own[step] for step in found}
    assert [step for step, _, _ in events(folder / "evaluator/eval")] == list(found)
    code, out, err = harness.finish(followed(folder), limit_secs=60)
    assert code == 0, out + err
    assert rows(results) == found


def test_a_process_whose_tf_config_says_evaluator_follows_the_run(tmp_path):
    """Beside a real run, which removes checkpoints under it."""
    folder = tmp_path / "run"
    flags = [*RUN, "--keep_checkpoints=2", "--checkpoint_every_steps=1", f"--workdir={folder}"]
    config = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": {"type": "evaluator", "index": 0}}
    process = harness.start(flags, TF_CONFIG=json.dumps(config))
    code, out, err = harness.run(*flags)
    assert code == 0, out + err
    code, out, err = harness.finish(process, limit_secs=60)
    assert code == 0, out + err
    found, own = rows(folder / "evaluator/metrics.jsonl"), rows(folder / "metrics.jsonl")
    assert max(found) == 12
    assert {step: own[step] for step in found if step in own} == {step: found[step] for step in found if step in own}
