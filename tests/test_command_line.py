"""The launchers as a person uses them: real processes, their exit codes, what they print and what they leave."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from distloop.cluster import Cluster, to_tf_config
from distloop.datasets import SAMPLE_DIR
from distloop.launcher.processes import free_ports
from distloop.metrics import TIMES
from distloop.workdir import write_json
from tests import harness
from tests.test_writers import events, lines

TOY = ("--task=tests.own_task:good", "--global_batch_size=4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task=mnist_cn"], "there is no task 'mnist_cn'; expected one of "),
        (["--task=no_such:make_task"], "there is no module 'no_such' for the task"),
        (["--task=mnist_cnn", "--epochs=-1"], "epochs is -1; expected a whole number of at least 1"),
        (["--task=mnist_cnn", "--train_steps=0"], "train_steps is 0; expected a whole number of at least 1"),
        (["--task=mnist_cnn", "--epochs=1", "--train_steps=1"], "epochs (1) and train_steps (1) are both given"),
        (["--task=mnist_cnn", "--strategy=pipeline"], "strategy is 'pipeline'; expected one of auto,"),
        (["--task=mnist_cnn", "--epochs=two"], "epochs"),
        (["--task=mnist_cnn", "--epoch=2"], "Unknown command line flag 'epoch'"),
        (["--task=mnist_cnn", "epochs=2"], "unexpected argument 'epochs=2'; settings are flags"),
    ],
    ids=lambda value: value[-1].partition("=")[2] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_sentence_and_exit_64_before_tensorflow_is_loaded(tmp_path, flags, sentence):
    refuses(tmp_path, flags, sentence, fresh=True)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        # told before the model is built
        (["--task=mnist_cnn", "--strategy=tpu"], "strategy is tpu, but there is no TPU here"),
        (
            ["--task=mnist_cnn", "--replicas=3", "--global_batch_size=64"],
            "global_batch_size (64) must be a multiple of the 3 replicas; use 63 or 66.",
        ),
        (["--task=launch.no_such:make_task"], "importing 'launch.no_such' failed with ModuleNotFoundError"),
        # told before the first step
        (["--task=mnist_cnn", "--data_dir=/no/such"], "data_dir /no/such is not a folder"),
        (["--task=tests.own_task:no_split"], "data set 'mnist' has no split 'validation'; it has train, test."),
        (
            [*TOY[1:], "--task=tests.own_task:scalar_loss"],
            "loss_fn returned a loss of shape (); expected one loss an ex",
        ),
        (
            [*TOY[1:], "--task=tests.own_task:no_metric"],
            "returned a tensor of shape () as 'loss', which is not a metric",
        ),
        ([*TOY[1:], "--task=tests.own_task:no_data"], "train_data has no examples; expected at least one"),
    ],
    ids=lambda value: value[-1].partition("=")[2] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_64_and_nothing_is_written(tmp_path, flags, sentence):
    refuses(tmp_path, flags, sentence, fresh=False)


def refuses(tmp_path, flags, sentence, *, fresh):
    code, out, err = harness.run("-m", "launch.train", f"--workdir={tmp_path / 'run'}", *flags, fresh=fresh)
    assert code == 64, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("distloop: ")]
    assert sentence in line
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_task_module_that_does_not_import_is_one_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("import not_installed\n")
    code, _, err = harness.run(
        "-m",
        "distloop",
        "--task=broken:make_task",
        f"--workdir={tmp_path / 'run'}",
        PYTHONPATH=f"{tmp_path}:{harness.ROOT}",
    )
    assert code == 64
    assert "importing 'broken' failed with ModuleNotFoundError: No module named 'not_installed'; make python -c" in err
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_left_alone(tmp_path):
    write_json(tmp_path / "config.json", {"task": "mnist_tutorial"})
    code, _, err = harness.run("-m", "launch.train", "--task=mnist_cnn", f"--workdir={tmp_path}", fresh=True)
    assert code == 64
    assert "holds another run (task='mnist_tutorial' there, 'mnist_cnn' here;" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_help_lists_the_flags():
    code, out, _ = harness.run("-m", "launch.train", "--help", fresh=True)
    assert code == 1  # absl's own choice
    for flag in ("--task", "--strategy", "--global_batch_size", "--checkpoint_every_steps"):
        assert flag in out


def checkpoint(workdir):
    newest = sorted((workdir / "checkpoints").iterdir())[-1]
    reader = tf.train.load_checkpoint(str(newest / "state"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def without_timing(workdir):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(workdir)]


def test_a_run_leaves_what_it_says_and_running_it_again_says_it_is_finished(tmp_path):
    command = ("-m", "launch.train", *TOY, "--epochs=4", "--steps_per_call=2", f"--workdir={tmp_path}")
    code, out, err = harness.run(*command, fresh=True)
    assert code == 0, out + err
    for fact in ("strategy", "replicas", "workers", "devices", "global batch", "per-replica batch", "total steps"):
        assert fact in out
    assert f"tensorboard --logdir {tmp_path}" in out
    assert re.search(r"┃ train +┃ test +┃\n.*\n│ loss │ [\d.]+ +│ [\d.]+ +│", out)
    for epoch in range(1, 5):
        assert re.search(rf"^epoch {epoch}   loss [\d.]+$", out, re.MULTILINE)
    assert err == ""  # none of TensorFlow's start-up lines
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "summary.json", "metrics.jsonl", "checkpoints", "train", "eval"),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["examples"], summary["eval_count"]) == (12, 40, 10)
    assert set(summary) >= {"train", "eval", "seconds", "examples_per_second"}

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, _ = harness.run(*command)
    assert (code, "is finished at step 12; nothing to do" in out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_terminal_shows_a_progress_bar(tmp_path):
    chief, terminal = pty.openpty()
    command = [sys.executable, "-m", "launch.train", *TOY, "--train_steps=40", "--steps_per_call=1"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=harness.ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = harness.read_terminal(chief)
    assert process.wait(timeout=60) == 0
    assert re.search(r"━.* \d+/40  loss \d\.\d+  [\d,]+ examples/s", shown.decode())


def test_workers_with_other_flags_or_another_workdir_stop_with_a_sentence(tmp_path):
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    first = ("-m", "distloop", *TOY, "--train_steps=8")
    for flags, sentence in (
        (["--train_steps=9"], "worker 1 has other flags than worker 0"),
        ([], "worker 1 found a checkpoint of step 0, worker 0 of step 8; give all workers the same --workdir"),
    ):
        processes = [
            harness.start(
                [*first, f"--workdir={tmp_path / str(index)}", *(flags if index else [])],
                TF_CONFIG=to_tf_config(Cluster(addresses, index)),
            )
            for index in range(2)
        ]
        try:
            for code, out, err in [harness.finish(process) for process in processes]:
                assert (code, sentence in err) == (64, True), out + err
        finally:
            for process in processes:
                harness.kill(process)
        # The next round finds a checkpoint of worker 0 alone, not finished.
        harness.run(*first, f"--workdir={tmp_path / '0'}")
        (tmp_path / "0/summary.json").unlink()


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("other_data_on_worker_1", "worker 1 reads other data than worker 0 (examples='11', x='float32 (3,) crc"),
        ("other_eval_data_on_worker_1", "worker 1 evaluates other data than worker 0 (examples='6', x='float32 (3,)"),
    ],
)
def test_workers_with_other_data_stop_with_a_sentence(tmp_path, task, sentence):
    command = ("-m", "distloop", f"--task=tests.own_task:{task}", *TOY[1:], f"--workdir={tmp_path / 'run'}")
    for code, out, err in harness.run_workers(command, workers=2):
        assert code == 64, out + err
        assert sentence in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_stops_being_finite_stops_all_workers_with_a_sentence(tmp_path):
    command = ("-m", "distloop", "--task=tests.own_task:diverges", *TOY[1:], f"--workdir={tmp_path / 'run'}")
    for code, out, err in harness.run_workers(command, workers=2):
        assert code == 65, out + err
        assert "the metric 'loss' stopped being finite at step 6; the variable 'model/net/dense/kernel' is" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_two_workers_write_event_files_by_the_chief_alone_and_equal_to_the_metrics(tmp_path):
    command = ("-m", "distloop", *TOY, "--epochs=3", "--steps_per_call=1", f"--workdir={tmp_path}")
    (code, out, err), _ = harness.run_workers(command, workers=2)
    assert code == 0, out + err
    assert "workers           2" in out
    written = lines(tmp_path)
    for split in ("train", "eval"):
        found = events(tmp_path / split)  # asserts that there is one file
        expected = [
            (line["step"], name, np.float32(value))
            for line in written
            if line["split"] == split
            for name, value in line.items()
            if name not in ("step", "split")
        ]
        assert found == expected
        for tag in {tag for _, tag, _ in found}:
            steps = [step for step, name, _ in found if name == tag]
            assert steps == sorted(set(steps))
    assert {tag for _, tag, _ in events(tmp_path / "train")} == {"loss", "epoch_loss", *TIMES}


def test_prepared_data_of_another_folder_is_read(tmp_path):
    code, out, err = harness.run(
        *("-m", "launch.train", "--task=mnist_cnn", f"--data_dir={SAMPLE_DIR}", "--train_steps=2"),
        f"--workdir={tmp_path / 'run'}",
    )
    assert code == 0, out + err


@pytest.mark.slow
def test_the_main_command_reaches_its_accuracy_on_the_sample(tmp_path):
    code, out, err = harness.run(
        *("-m", "launch.train", "--task=mnist_cnn", "--epochs=5", f"--workdir={tmp_path / 'run'}")
    )
    assert code == 0, out + err
    assert json.loads((tmp_path / "run/summary.json").read_text())["eval"]["accuracy"] >= 0.96
