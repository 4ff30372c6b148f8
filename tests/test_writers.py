import json

import pytest
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from distloop.errors import UsageError
from distloop.writers import make_writer


def events(folder):
    """Return [(step, tag, value)] of the only event file in `folder`."""
    (file,) = folder.glob("events.out.tfevents.*")
    found = []
    for record in tf.data.TFRecordDataset(str(file)):
        event = Event.FromString(record.numpy())
        found.extend((event.step, v.tag, float(tf.make_ndarray(v.tensor))) for v in event.summary.value)
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_what_is_written_reads_back_from_both_files(tmp_path):
    write = make_writer(tmp_path, after_step=0)
    write(5, "train", {"loss": 0.25, "accuracy": 0.5})
    write(5, "eval", {"loss": 0.75})
    assert lines(tmp_path) == [
        {"step": 5, "split": "train", "loss": 0.25, "accuracy": 0.5},
        {"step": 5, "split": "eval", "loss": 0.75},
    ]
    assert events(tmp_path / "train") == [(5, "loss", 0.25), (5, "accuracy", 0.5)]
    assert events(tmp_path / "eval") == [(5, "loss", 0.75)]


def test_a_crash_between_a_new_event_file_and_the_removal_of_the_old_doubles_nothing(tmp_path):
    make_writer(tmp_path, after_step=0)(1, "train", {"loss": 1.0})
    (old,) = (tmp_path / "train").iterdir()
    content = old.read_bytes()
    make_writer(tmp_path, after_step=1)(2, "train", {"loss": 2.0})
    old.write_bytes(content)  # as if it had not been removed
    make_writer(tmp_path, after_step=2)(3, "train", {"loss": 3.0})
    assert events(tmp_path / "train") == [(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 3.0)]


def test_a_crash_while_a_new_event_file_is_written_loses_no_event(tmp_path):
    make_writer(tmp_path, after_step=0)(1, "train", {"loss": 1.0})
    (old,) = (tmp_path / "train").iterdir()
    torn = tmp_path / "train/events.out.tfevents.9999999999.000000.host.tmp"
    torn.write_bytes(old.read_bytes()[:7])
    make_writer(tmp_path, after_step=1)(2, "train", {"loss": 2.0})
    assert not torn.exists()
    assert events(tmp_path / "train") == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_event_files_of_others_and_lines_that_are_no_metrics_are_left_alone(tmp_path):
    make_writer(tmp_path, after_step=0)(1, "train", {"loss": 1.0})
    (tmp_path / "mine").mkdir()
    for name in ("1", "2"):
        (tmp_path / f"mine/events.out.tfevents.{name}.host").write_bytes(b"mine")
    make_writer(tmp_path, after_step=1)
    assert len(list((tmp_path / "mine").iterdir())) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("no metrics\n")
    with pytest.raises(UsageError, match="has a line that is no metrics: b'no metrics"):
        make_writer(tmp_path, after_step=1)


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_resumed_run_holds_each_step_once_in_one_file(tmp_path, crashes):
    write = make_writer(tmp_path, after_step=0)
    write(1, "train", {"loss": 1.0})
    for _ in range(crashes):
        write(3, "train", {"loss": 9.0})
        for file in (tmp_path / "metrics.jsonl", *(tmp_path / "train").iterdir()):
            with file.open("ab") as torn:
                torn.write(b'{"step": 4, "sp')  # a crash in the middle of a write
        write = make_writer(tmp_path, after_step=2)
    write(3, "train", {"loss": 3.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (3, 3.0)]
    assert events(tmp_path / "train") == [(1, "loss", 1.0), (3, "loss", 3.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "train"]
