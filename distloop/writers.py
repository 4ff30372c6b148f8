"""Where values go: `metrics.jsonl` and event files. A writer is a function `(step, split, {name: float})`.

Only the chief makes one: two writers in a folder of event files would lose data (tensorboard#1011).
"""

import io
import json
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from distloop import storage
from distloop.errors import StorageError, UsageError
from distloop.storage import Path
from distloop.workdir import finite

Writer = Callable[[int, str, Mapping[str, float]], None]


def make_writer(workdir: Path, *, after_step: int) -> Writer:
    """Return a writer of `metrics.jsonl` and of one event file in a folder for each split (`train/`, `eval/`).

    A resumed run goes on after `after_step`: what was written later, before a crash, is dropped, so that each step is
    there once. Every write is there when it returns; on an object store each writes the whole file again. A writer
    raises StorageError if it cannot write.
    """
    metrics_file = workdir / "metrics.jsonl"
    _cut_metrics(metrics_file, after_step)
    folders = [path.parent for split in ("train", "eval") for path in (workdir / split).glob(f"{_EVENTS}*")]
    event_files = {folder.name: _cut_events(folder, after_step) for folder in dict.fromkeys(folders)}

    def write(step: int, split: str, values: Mapping[str, float]) -> None:
        try:
            append(step, split, values)
        except OSError as error:
            raise StorageError(
                f"the metrics of step {step} could not be written ({error}); make room, and the same command goes on "
                "from the last checkpoint."
            ) from error

    def append(step: int, split: str, values: Mapping[str, float]) -> None:
        if split not in event_files:
            event_files[split] = _cut_events(workdir / split, after_step)
        events = [
            Event(wall_time=time.time(), step=step, summary=scalar_pb(name, value)).SerializeToString()
            for name, value in values.items()
        ]
        storage.append(event_files[split], _as_records(events))
        # Last, since it says how far one has come: events that have no row yet are dropped and written again.
        storage.append(metrics_file, json.dumps({"step": step, "split": split, **finite(values)}).encode() + b"\n")

    return write


_EVENTS = "events.out.tfevents."  # how TensorBoard knows an event file


def _cut_metrics(path: Path, last_step: int) -> None:
    kept = b""
    if path.exists():
        # A line that a crash cut short has no newline.
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        kept = b"".join(line for line in lines if _step_of(line, path) <= last_step)
    storage.write_whole(path, kept)


def _step_of(line: bytes, path: Path) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} has a line that is no metrics: {line[:80]!r}; take it out, or move the file."
        ) from error


def _cut_events(folder: Path, last_step: int) -> Path:
    """Return a new event file that starts with the events up to `last_step` and takes the place of the older ones.

    It is a new file because a TensorBoard that is watching goes on to it, and drops the steps it comes again to.
    """
    folder.mkdir(exist_ok=True)
    found = sorted(folder.glob(f"{_EVENTS}*"))
    older = [path for path in found if path.suffix != ".tmp"]  # what a crash has left half-written
    # The newest holds what the older ones held, which a crash may have kept from being removed.
    kept = [record for path in older[-1:] for record in _records(path) if Event.FromString(record).step <= last_step]
    first = Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
    target = folder / f"{_EVENTS}{time.time():017.6f}.{socket.gethostname()}"
    storage.write_whole(target, _as_records(kept or [first]))
    for path in found:
        path.unlink()
    return target


def _as_records(events: Iterable[bytes]) -> bytes:
    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event)
    return content.getvalue()


def _records(path: Path) -> Iterator[bytes]:
    """Yield the whole records of a TFRecord file: length (8 bytes), its checksum (4), data, checksum (4)."""
    content = path.read_bytes()
    begin = 0
    while begin + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, begin)
        end = begin + 12 + length + 4
        if end > len(content):
            return  # cut short by a crash
        yield content[begin + 12 : end - 4]
        begin = end
