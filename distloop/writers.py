"""Where values go: `metrics.jsonl` and event files. A writer is a function `(step, split, {name: float})`.

Only the chief makes writers: two in one folder would lose data (tensorboard#1011).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)

Writer = Callable[[int, str, Mapping[str, float]], None]


def make_writer(workdir: Path, *, after_step: int) -> Writer:
    """Return a writer of `metrics.jsonl` and of event files in `train/` and `eval/`.

    A resumed run goes on after `after_step`: what was written later, before a crash, is dropped, so that each step is
    there once.
    """
    metrics_path = workdir / "metrics.jsonl"
    _keep_lines(metrics_path, after_step)
    event_writers: dict[str, tf.summary.SummaryWriter] = {}

    def write(step: int, split: str, values: Mapping[str, float]) -> None:
        with metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        if split not in event_writers:
            _keep_events(workdir / split, after_step)
            event_writers[split] = tf.summary.create_file_writer(str(workdir / split))
        with event_writers[split].as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step=step)
        event_writers[split].flush()

    return write


def _keep_lines(path: Path, last_step: int) -> None:
    if path.exists():
        # A line that a crash cut short has no newline; it is later than the checkpoint anyway.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


def _keep_events(folder: Path, last_step: int) -> None:
    """Rewrite a run's event files as one with the events up to `last_step`, so that one writer stays the rule."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return
    kept = files[0].with_name(files[0].name + ".tmp")
    with tf.io.TFRecordWriter(str(kept)) as writer:
        for file in files:
            for record in tf.data.TFRecordDataset(str(file)).apply(tf.data.experimental.ignore_errors()):
                if Event.FromString(record.numpy()).step <= last_step:
                    writer.write(record.numpy())
    for file in files[1:]:
        file.unlink()
    kept.replace(files[0])
