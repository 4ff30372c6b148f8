"""Resume deep inside an epoch of one million small records; print the times to the first batch, and what was read.

    python docs/evidence/one_million_records.py [FOLDER]

Each start is a process of its own. "read" counts what the process read from files after TensorFlow was imported
(`rchar` of /proc/self/io), and "of the file" the part of it that came from the record file (`TFRecord` reads are exact:
16 bytes beside the data).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORDS, SIZE, BATCH = 1_000_000, 100, 256
STEP = 3_500  # of 3,907 an epoch


def write(path: Path) -> None:
    """Write the records: a number and 100 random bytes each."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        noise = os.urandom(1_000_000)
        for number in range(RECORDS):
            begin = number * 7 % (len(noise) - SIZE)
            values = {
                "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
                "bytes": tf.train.Feature(bytes_list=tf.train.BytesList(value=[noise[begin : begin + SIZE]])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString())


def start(path: Path, *, first_step: int) -> None:
    """Read one batch as a run that resumes at `first_step` does; print what it took as JSON."""
    import tensorflow as tf

    from distloop import Pipeline, load_tfrecords
    from distloop.data import make_stream, per_replica_batches

    spec = {"id": tf.io.FixedLenFeature([], tf.int64), "bytes": tf.io.FixedLenFeature([], tf.string)}
    tf.constant(0)
    before, began = bytes_read(), time.perf_counter()
    source = Pipeline(load_tfrecords(path), map=lambda record: tf.io.parse_single_example(record, spec))
    indexed = time.perf_counter()
    stream = make_stream(source, name="train_data", global_batch_size=BATCH, seed=0)
    batches = per_replica_batches(stream, tf.distribute.InputContext(), first_step=first_step)
    next(iter(batches))
    ended = time.perf_counter()
    print(json.dumps({"index": indexed - began, "batch": ended - indexed, "read": bytes_read() - before}))


def bytes_read() -> int:
    """Return how many bytes this process has read by system calls."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def main(folder: Path) -> None:
    """Write the file where it is not there, and start three times."""
    path = folder / "million.tfrecord"
    if not path.exists():
        write(path)
    print(f"{RECORDS:,} records, {path.stat().st_size:,} bytes, batch {BATCH}, resumed at step {STEP:,}")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, step in [("no index yet", STEP), ("index kept", STEP), ("index kept, from the start", 0)]:
        command = [sys.executable, __file__, str(path), str(step)]
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        took = json.loads(out.splitlines()[-1])
        print(
            f"{name:27} index {took['index']:5.2f} s   first batch {took['batch']:5.2f} s   "
            f"read {took['read'] / 1e6:7.2f} MB"
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        start(Path(sys.argv[1]), first_step=int(sys.argv[2]))
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
