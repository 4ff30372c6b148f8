"""TFRecord files by index: found once from the headers alone, kept for the next start, refused where it cannot work."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from distloop import load_tfrecords, records
from distloop.errors import UsageError
from distloop.records import in_turn, reader, records_of
from tests.streams import write_records


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/distloop/tfrecords"


def of_tensorflow(names):
    return list(tf.data.TFRecordDataset(names).as_numpy_iterator())


def by_index(found):
    read = reader(found)
    rows = tf.data.Dataset.range(len(found))
    return list(rows.flat_map(read).as_numpy_iterator())


def test_records_by_index_and_in_turn_are_those_that_tensorflow_reads(tmp_path):
    names = write_records(tmp_path, 3)
    found = load_tfrecords(str(tmp_path / "part-*"))
    assert found.files == tuple(names)
    assert found.sizes == tuple(Path(name).stat().st_size for name in names)
    assert by_index(found) == list(in_turn(found).as_numpy_iterator()) == of_tensorflow(names)


def test_parts_of_files_keep_their_order(tmp_path):
    one, other = write_records(tmp_path, 2, n=20)
    found = records_of([(other, 2, 3), (one, 1, None), (other, 0, 0)])
    expected = of_tensorflow([other])[2:5] + of_tensorflow([one])[1:]
    assert by_index(found) == list(in_turn(found).as_numpy_iterator()) == expected


def test_only_headers_are_read(tmp_path):
    name = tmp_path / "large.tfrecord"
    with name.open("wb") as file:  # three records of 100 GB, all holes
        for number in range(3):
            file.seek(number * (10**11 + 16))
            file.write(struct.pack("<Q", 10**11))
        file.truncate(3 * (10**11 + 16))
    assert load_tfrecords(name).offsets.tolist() == [number * (10**11 + 16) for number in range(3)]


def test_the_next_start_reads_the_index_alone(tmp_path, cache, monkeypatch):
    names = write_records(tmp_path, 3)
    first = load_tfrecords(names)
    assert len([path for path in cache.iterdir() if path.suffix == ".npy"]) == len(list(cache.iterdir())) == 3
    monkeypatch.setattr(records, "_local_starts", lambda *_: pytest.fail("looked into the file"))
    np.testing.assert_array_equal(load_tfrecords(names).offsets, first.offsets)


def test_a_file_that_has_changed_is_looked_at_again(tmp_path):
    (name,) = write_records(tmp_path, 1, n=4)
    assert len(load_tfrecords(name)) == 4
    write_records(tmp_path, 1, n=5)
    assert len(load_tfrecords(name)) == 5


@pytest.mark.parametrize("obstacle", ["a file", "cut short"])
def test_a_cache_that_does_not_work_is_no_error(tmp_path, cache, obstacle):
    (name,) = write_records(tmp_path, 1)
    if obstacle == "a file":
        cache.parent.parent.write_text("in the way")
    else:
        load_tfrecords(name)
        (kept,) = cache.iterdir()
        kept.write_bytes(kept.read_bytes()[:40])
    assert len(load_tfrecords(name)) == 21


def test_files_on_other_storage_are_read_too(tmp_path):
    names = []
    for local in write_records(tmp_path, 2):
        names.append(f"ram://records/{Path(local).name}")
        tf.io.gfile.makedirs("ram://records")
        tf.io.gfile.copy(local, names[-1], overwrite=True)
    assert by_index(load_tfrecords("ram://records/part-*")) == of_tensorflow(names)


def test_what_cannot_be_read_by_index_is_refused(tmp_path):
    (name,) = write_records(tmp_path, 1)
    whole = Path(name).read_bytes()
    cases = {
        "zlib": (zlib.compress(whole), "is compressed"),
        "compressed": (gzip.compress(whole), "is compressed, and what is compressed cannot be read by index"),
        "cut": (whole[:-1], "has no whole record at byte"),
        "cut_in_header": (whole + b"12345", f"has no whole record at byte {len(whole):,} of {len(whole) + 5:,}"),
        "text": (b"id,label\n1,2\n3,4\n5,6\n", "expected a TFRecord file"),
    }
    for case, (content, sentence) in cases.items():
        path = tmp_path / case
        path.write_bytes(content)
        with pytest.raises(UsageError) as refusal:
            load_tfrecords(path)
        assert sentence in str(refusal.value), case


def test_a_first_record_as_long_as_a_magic_number_is_no_compression(tmp_path):
    name = str(tmp_path / "plain")
    with tf.io.TFRecordWriter(name) as writer:
        writer.write(b"x" * int.from_bytes(b"\x1f\x8b", "little"))
    assert len(load_tfrecords(name)) == 1


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no file matches"):
        load_tfrecords(str(tmp_path / "none-*"))
    with pytest.raises(UsageError, match="is not a file; expected a TFRecord file"):
        load_tfrecords([tmp_path / "none"])
    with pytest.raises(UsageError, match="is not a file"):
        load_tfrecords(tmp_path)
    with pytest.raises(UsageError, match="an empty list"):
        load_tfrecords([])


def test_damage_within_a_record_stops_the_reading(tmp_path):
    (name,) = write_records(tmp_path, 1, n=3)
    content = bytearray(Path(name).read_bytes())
    content[14] ^= 1
    Path(name).write_bytes(content)
    with pytest.raises(tf.errors.DataLossError):
        by_index(load_tfrecords(name))
