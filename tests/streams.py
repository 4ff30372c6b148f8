"""Streams for tests: numbered examples from each kind of source, read as all workers together see them."""

from itertools import islice

import numpy as np
import tensorflow as tf

from distloop.data import make_stream, per_replica_batches

N, BATCH, STEPS = 21, 8, 3  # 8 + 8 + 5


def arrays():
    return {"id": np.arange(N), "double": 2 * np.arange(N)}


def dataset():
    return tf.data.Dataset.from_tensor_slices(arrays())


def write_records(folder, files, n=N):
    """Write examples 0 to n-1 of growing length to so many TFRecord files, of uneven sizes; return their names."""
    folder.mkdir(exist_ok=True, parents=True)
    names = [str(folder / f"part-{k}.tfrecord") for k in range(files)]
    ends = [k * k * n // files**2 for k in range(1, files)]
    for name, numbers in zip(names, np.split(np.arange(n), ends), strict=True):
        with tf.io.TFRecordWriter(name) as writer:
            for number in numbers:
                values = {"id": [number], "tokens": [number] * (number % 5)}
                feature = {k: tf.train.Feature(int64_list=tf.train.Int64List(value=v)) for k, v in values.items()}
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    return names


def decode(record):
    example = tf.io.parse_single_example(record, {"id": tf.io.FixedLenFeature([], tf.int64)})
    return {**example, "double": 2 * example["id"]}


def decode_tokens(record):
    return tf.io.parse_single_example(record, {"tokens": tf.io.VarLenFeature(tf.int64)})


def read(source, *, steps, workers=1, replicas=1, seed=7, first_step=0, batch=BATCH):
    """Return {name: [steps, batch, ...]}: what all replicas of all workers see, put together in replica order."""
    stream = make_stream(source, name="train_data", global_batch_size=batch, seed=seed)
    local = replicas // workers
    parts = []
    for worker in range(workers):
        context = tf.distribute.InputContext(workers, worker, replicas)
        batches = per_replica_batches(stream, context, first_step=first_step)
        elements = list(islice(batches.as_numpy_iterator(), steps * local))
        assert all(len(element["weight"]) == batch // replicas for element in elements)
        columns = {k: np.stack([e[k] for e in elements]) for k in elements[0]}
        parts.append({k: v.reshape(steps, -1, *v.shape[2:]) for k, v in columns.items()})
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def ids(batches, steps=slice(None)):
    return batches["id"][steps][batches["weight"][steps] > 0].tolist()
