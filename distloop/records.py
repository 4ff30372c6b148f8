"""TFRecord files that are read by index: where each record starts is found once and kept in a cache folder."""

import contextlib
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops

from distloop.errors import UsageError

_AROUND = 16  # bytes beside a record's data: length (8) and its checksum (4) before it, the data's checksum (4) behind
_BLOCK = 1 << 18  # bytes that are read at once where records are read in turn
_LENGTH = struct.Struct("<Q")
_RECORD = tf.TensorSpec([], tf.string)


@final
@dataclass(frozen=True, eq=False)
class Records:
    """Name TFRecord files and where their records start: `offsets` int64 holds those of the first file, then so on.

    An example is one record's bytes, a scalar string; give it to `Pipeline` with a `map` that decodes it. 8 bytes a
    record are held in memory.
    """

    files: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes of each file
    counts: tuple[int, ...]  # records that are taken from each file, one after the other
    offsets: np.ndarray

    def __len__(self) -> int:
        return sum(self.counts)


def load_tfrecords(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Records:
    """Return the records of TFRecord files, in the order of their names, to be read by index.

        Pipeline(load_tfrecords("data/train-*.tfrecord"), map=decode)

    `files` is a pattern or a list, local or on any storage that TensorFlow reads. The first call reads the header of
    every record (of small records: everything) and keeps what it found in `XDG_CACHE_HOME` or `~/.cache`, by path,
    size and time of change. Raises UsageError for files that are not there, compressed, cut short or no TFRecords.
    """
    if isinstance(files, str | os.PathLike):
        names = sorted(tf.io.gfile.glob(os.fspath(files)))
        if not names:
            raise UsageError(f"no file matches {os.fspath(files)!r}; expected TFRecord files: check the pattern.")
    else:
        names = [os.fspath(name) for name in files]
        if not names:
            raise UsageError("load_tfrecords got an empty list; expected TFRecord files.")
    for name in names:
        if not tf.io.gfile.exists(name) or tf.io.gfile.isdir(name):
            raise UsageError(
                f"{name} is not a file; expected a TFRecord file, or a pattern such as data/train-*.tfrecord."
            )
    return records_of([(name, 0, None) for name in names])


def records_of(parts: Sequence[tuple[str, int, int | None]]) -> Records:
    """Return the records of `(file, how many to skip, how many to take)`; None takes the rest."""
    with ThreadPoolExecutor(16) as pool:  # headers on remote storage are many small requests
        found = list(pool.map(lambda part: _index(part[0]), parts))
    offsets, sizes = [], []
    for (_, skip, take), (starts, size) in zip(parts, found, strict=True):
        offsets.append(starts[skip : None if take is None else skip + take])
        sizes.append(size)
    files = tuple(name for name, *_ in parts)
    return Records(files, tuple(sizes), tuple(map(len, offsets)), np.concatenate(offsets))


def reader(records: Records) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """Return a function from a row number (int64 scalar) to a dataset of that one record. It works in a graph.

    TensorFlow opens the file, reads the record and verifies its checksum: about 40 us a record.
    """
    with tf.device("CPU:0"):  # where tf.data runs
        files, offsets = tf.constant(records.files), tf.constant(records.offsets)
        ends = tf.constant(list(accumulate(records.counts)), tf.int64)

    def read(row: tf.Tensor) -> tf.data.Dataset:
        file = tf.searchsorted(ends, row[None], side="right")[0]
        return _records_from(tf.gather(files, file), tf.gather(offsets, row), buffer_size=0).take(1)

    return read


def in_turn(records: Records) -> tf.data.Dataset:
    """Return a dataset of all records in their order: one pass over the files, much faster than by index."""
    firsts = [end - count for end, count in zip(accumulate(records.counts), records.counts, strict=True)]
    parts = [
        (f, records.offsets[first], n) for f, first, n in zip(records.files, firsts, records.counts, strict=True) if n
    ]
    files, starts, counts = (list(column) for column in zip(*parts, strict=True))
    columns: Any = tf.data.Dataset.from_tensor_slices((files, np.array(starts, np.int64), np.array(counts, np.int64)))
    return columns.flat_map(lambda file, start, n: _records_from(file, start, buffer_size=_BLOCK).take(n))


def _records_from(file: tf.Tensor, offset: tf.Tensor, *, buffer_size: int) -> tf.data.Dataset:
    variant: Any = tf.raw_ops.TFRecordDatasetV2(
        filenames=file[None], compression_type="", buffer_size=buffer_size, byte_offsets=offset[None]
    )
    dataset: Any = dataset_ops._VariantDataset(variant, _RECORD)  # the op is public, its way into a Dataset is not
    return dataset


def _index(name: str) -> tuple[np.ndarray, int]:
    """Return where each record of a file starts, and the file's size."""
    remote = "://" in name
    if remote:
        stat = tf.io.gfile.stat(name)
        size, changed = stat.length, stat.mtime_nsec
    else:
        path = Path(name).resolve()
        name, size, changed = str(path), path.stat().st_size, path.stat().st_mtime_ns
    key = hashlib.sha256(f"{name}\n{size}\n{changed}".encode()).hexdigest()[:32]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distloop" / "tfrecords" / f"{key}.npy"
    try:
        return np.load(kept), size
    except (OSError, ValueError, EOFError):  # not there, or cut short by whatever wrote it
        pass
    starts = np.array(_remote_starts(name, size) if remote else _local_starts(name, size), np.int64)
    _keep(kept, starts)
    return starts, size


def _local_starts(name: str, size: int) -> list[int]:
    starts, start, head = [], 0, b""
    if size:
        with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # noqa: PTH123
            head = data[: _LENGTH.size]
            if size >= _AROUND and _LENGTH.unpack(head)[0] > _BLOCK:
                data.madvise(mmap.MADV_RANDOM)  # of large records only the pages with their headers
            while start <= size - _AROUND:  # 0.3 us a record, so without a call
                starts.append(start)
                start += _LENGTH.unpack_from(data, start)[0] + _AROUND
    _check_end(name, size, starts, start, head)
    return starts


def _remote_starts(name: str, size: int) -> list[int]:
    starts, start = [], 0
    with tf.io.gfile.GFile(name, "rb") as file:
        block, block_start = file.read(_BLOCK), 0
        head = block[:2]
        while start <= size - _AROUND:
            if start + _LENGTH.size > block_start + len(block):
                file.seek(start)
                block, block_start = file.read(_BLOCK), start
            starts.append(start)
            start += _LENGTH.unpack_from(block, start - block_start)[0] + _AROUND
    _check_end(name, size, starts, start, head)
    return starts


def _check_end(name: str, size: int, starts: list[int], end: int, head: bytes) -> None:
    """Raise UsageError unless the last record ends where the file does; `head` are the file's first bytes."""
    if end == size:
        return
    if head[:2] in (b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"):  # gzip and zlib
        raise UsageError(
            f"{name} is compressed, and what is compressed cannot be read by index; write it again with plain "
            "tf.io.TFRecordWriter(path), or read it with tf.data.TFRecordDataset."
        )
    last = starts[-1] if end > size else end
    raise UsageError(
        f"{name} has no whole record at byte {last:,} of {size:,}; expected a TFRecord file: it was cut short, is "
        "still being written, or is of another format."
    )


def _keep(path: Path, starts: np.ndarray) -> None:
    """Write an index for the next start, whole or not at all; where that cannot be done, it is found again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.save(file, starts)
                file.flush()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
