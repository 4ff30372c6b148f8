"""What the tasks promise on the full data sets, which are not in the package."""

import json
import os

import pytest

from tests import harness

pytestmark = pytest.mark.skipif(
    "DISTLOOP_TFDS" not in os.environ, reason="needs DISTLOOP_TFDS, a folder with the full MNIST prepared by TFDS"
)


@pytest.mark.parametrize(("task", "least"), [("mnist_cnn", 0.98), ("mnist_tutorial", 0.975)])
def test_five_epochs_of_full_mnist_reach_the_tutorials_accuracy(tmp_path, task, least):
    code, out, err = harness.run(
        *("-m", "launch.train", f"--task={task}", "--epochs=5", f"--workdir={tmp_path / 'run'}"),
        f"--data_dir={os.environ['DISTLOOP_TFDS']}",
        limit_secs=600,
    )
    assert code == 0, out + err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["examples"], summary["eval_count"]) == (300_000, 10_000)
    assert summary["eval"]["accuracy"] >= least
