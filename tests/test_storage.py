"""Runs on a remote file system: TensorFlow's `ram://`, which goes the way of `gs://`."""

import dataclasses
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from distloop import RunConfig, State, StorageError, UsageError, checkpoint_files, evaluate, export, storage, train
from distloop.writers import make_writer
from tests import harness, ram, toy
from tests.test_writers import events, lines


@pytest.fixture
def remote():
    with ram.served():
        yield "ram://bucket"
        storage.remove(storage.as_path("ram://bucket"))


def settings_of(workdir, **settings):
    return RunConfig(
        **{"workdir": workdir, "global_batch_size": 4, "epochs": 2, "strategy": "default", "eval_every_steps": 2}
        | settings
    )


def test_a_whole_run_trains_resumes_evaluates_and_exports_on_a_remote_file_system(remote, tmp_path):
    config = settings_of(f"{remote}/run", checkpoint_every_steps=2)
    local = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    expected = train(toy.make_task(local), local)
    folder = storage.as_path(config.workdir)
    summary = train(toy.make_task(config), config)
    assert (summary["train"], summary["eval"]) == (expected["train"], expected["eval"])
    assert evaluate(toy.make_task(config), config) == summary["eval"]

    newest = checkpoint_files.all_folders(folder / "checkpoints")[-1]
    content = (newest / "state.data-00000-of-00001").read_bytes()
    (newest / "state.data-00000-of-00001").unlink()  # ram:// appends to what is there
    (newest / "state.data-00000-of-00001").write_bytes(content[:-1])
    (folder / "summary.json").unlink()
    again = train(toy.make_task(config), config)  # from the checkpoint before
    assert (again["train"], again["eval"]) == (summary["train"], summary["eval"])
    values = [
        checkpoint_files.read(parent / newest.name).values for parent in (newest.parent, tmp_path / "run/checkpoints")
    ]
    for name, value in values[0].items():
        np.testing.assert_array_equal(value, values[1][name], err_msg=name)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}
    assert [(line["step"], line["split"]) for line in lines(folder)] == [
        (line["step"], line["split"]) for line in lines(tmp_path / "run")
    ]
    for split in ("train", "eval"):
        ours, theirs = ([(step, tag) for step, tag, _ in events(where / split)] for where in (folder, tmp_path / "run"))
        assert [one for one in ours if "seconds" not in one[1]] == [one for one in theirs if "seconds" not in one[1]]

    export(config.workdir, f"{remote}/exported", task=toy.make_task(config))
    loaded = tf.saved_model.load(f"{remote}/exported")
    errors = loaded.serve(tf.constant(toy.DATA["x"]))[:, 0] - toy.DATA["y"]
    assert np.mean(errors**2) == pytest.approx(summary["eval"]["loss"], rel=1e-5)


@pytest.mark.parametrize("path", ["s3://bucket/run", "nosuch://bucket/run"])
def test_a_file_system_that_is_not_served_is_refused_with_a_sentence(path):
    with pytest.raises(UsageError, match=f"{path} cannot be reached.* expected a local path"):
        storage.as_path(path)


def test_a_failure_of_a_remote_file_system_is_an_oserror(remote):
    folder = storage.as_path(f"{remote}/a")
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        storage.size(folder / "nothing")
    storage.append(folder / "file", b"one\n")
    storage.append(folder / "file", b"two\n")
    assert (folder / "file").read_bytes() == b"one\ntwo\n"
    storage.write_whole(folder / "file", b"three\n")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == b"three\n"


def test_100_cycles_of_checkpoint_and_evaluation_leave_no_memory_behind(tmp_path):
    used = []

    def measure(progress):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append(pages * resource.getpagesize() / 1e6)

    config = settings_of(
        str(tmp_path), epochs=None, train_steps=120, steps_per_call=1, eval_every_steps=1, checkpoint_every_steps=1
    )
    task = toy.make_task(config)

    def build():  # large enough that one copy left behind a cycle is seen
        return State(**task.build().parts, ballast=tf.Variable(tf.zeros([750_000])))

    train(dataclasses.replace(task, build=build), config, extra_actions=[measure])
    assert len(used) == 120
    slope, _ = np.polyfit(np.arange(100), used[20:], 1)  # MB a cycle, without those in which caches fill
    assert slope < 1


def test_a_real_disk_that_fills_up_keeps_the_checkpoints_before_and_a_read_only_one_is_refused(tmp_path):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"]).returncode != 0:
        pytest.skip("needs unprivileged namespaces, to mount a small tmpfs")
    code = "import os, sys; os.execvp('unshare', ['unshare', '-rm', sys.executable, *sys.argv[1:]])"
    code, out, err = harness.run("-c", code, "-m", "tests.full_disk", str(tmp_path), limit_secs=60)
    assert code == 0, err
    old, new, refused = out.splitlines()
    assert (old, new) == ("{'step': 1}", "{'step': 3}")
    assert refused.startswith(f"workdir {tmp_path}/run: {tmp_path} cannot be written to; give a folder of yours")
    said = [line for line in err.splitlines() if line.startswith("distloop: ")]
    assert len(said) == 2
    for line in said:
        assert "step_00000002 could not be written (" in line
        assert "No space left on device" in line


def test_a_full_disk_stops_the_metrics_with_a_sentence(tmp_path):
    write = make_writer(storage.as_path(tmp_path), after_step=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics of step 3 could not be written \(.*No space left on device"):
        write(3, "train", {"loss": 1.0})


def test_a_disk_that_is_full_at_the_start_is_refused(tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")  # the kernel's own full disk
    config = settings_of(str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be written to \(.*No space left on device.*\); free some space"):
        train(toy.make_task(config), config)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 100)
    config = settings_of(str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"has 0\.0 MB left, but one checkpoint takes 0\.0 MB; free some space"):
        train(toy.make_task(config), config)


def test_a_local_path_is_the_path_that_was_given(tmp_path):
    assert storage.as_path("runs/a") == epath.Path("runs/a")
    assert not storage.is_remote(storage.as_path(tmp_path))
