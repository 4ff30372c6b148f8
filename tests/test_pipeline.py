"""Promise P4 for pipelines: order, shares, augmentation and resume are those of arrays; nothing is decoded in vain."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from distloop import Pipeline, RunConfig, in_memory, load_tfds, load_tfrecords, mean, on_disk
from distloop.data import describe, make_stream, per_replica_batches
from distloop.errors import UsageError
from tests import toy
from tests.streams import BATCH, STEPS, N, arrays, dataset, decode, decode_tokens, ids, read, write_records


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def order_of_arrays():
    return read(arrays(), steps=3 * STEPS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {number: write_records(folder / str(number), number) for number in (1, 2, 3, 8)}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_every_record_comes_once_an_epoch_in_one_order_for_any_workers_and_files(
    files, order_of_arrays, number, workers
):
    source = Pipeline(load_tfrecords(files[number]), map=decode)
    batches = read(source, steps=3 * STEPS, workers=workers, replicas=workers)
    for name in ("id", "double", "weight"):
        np.testing.assert_array_equal(batches[name], order_of_arrays[name])
    epochs = [ids(batches, slice(e * STEPS, (e + 1) * STEPS)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="numbers",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"id": np.int64, "double": np.int64}),
        split_datasets={"train": dataset()},
        data_dir=folder,
        disable_shuffling=True,
    )
    return str(folder)


def test_tfds_is_read_by_index_too(tfds_dir, order_of_arrays):
    source = load_tfds("numbers", "train", tfds_dir)
    batches = read(source, steps=3 * STEPS, workers=4, replicas=4)
    np.testing.assert_array_equal(batches["id"], order_of_arrays["id"])


def test_a_part_of_a_tfds_split_has_the_examples_that_tfds_gives(tfds_dir):
    assert in_memory(load_tfds("numbers", "train[5:9]", tfds_dir))["id"].tolist() == [5, 6, 7, 8]
    batches = read(load_tfds("numbers", "train[5:9]", tfds_dir), steps=2, batch=2)
    assert sorted(ids(batches)) == [5, 6, 7, 8]


def jitter(example, seed):
    return {**example, "seed": seed, "u": tf.random.stateless_uniform([], seed)}


KINDS = {
    "arrays": lambda files: arrays(),
    "records": lambda files: Pipeline(load_tfrecords(files[3]), map=decode),
    "dataset": lambda files: Pipeline(
        tf.data.TFRecordDataset(files[3]).apply(tf.data.experimental.assert_cardinality(N)), map=decode
    ),
}


@pytest.fixture(scope="module")
def augmented(files):
    return {kind: read(Pipeline(make(files), augment=jitter), steps=3 * STEPS) for kind, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_is_the_same_for_any_workers_and_after_a_resume(files, augmented, kind):
    source, whole = Pipeline(KINDS[kind](files), augment=jitter), augmented[kind]
    late_and_shared = read(source, steps=3 * STEPS - 4, first_step=4, workers=2, replicas=4)
    for name in ("id", "seed", "u", "weight"):
        np.testing.assert_array_equal(whole[name][4:], late_and_shared[name])
    drawn = whole["u"][whole["weight"] > 0]
    assert len(set(drawn.tolist())) == 3 * N  # another one for each example in each epoch


def test_another_seed_augments_differently(augmented):
    other = read(Pipeline(arrays(), augment=jitter), steps=1, seed=8)
    assert not set(other["u"].ravel().tolist()) & set(augmented["arrays"]["u"].ravel().tolist())


def test_an_example_is_augmented_alike_whatever_it_is_read_from(augmented):
    drawn = []
    for batches in augmented.values():
        order = np.argsort(ids(batches, slice(0, STEPS)))
        drawn.append(batches["u"][:STEPS][batches["weight"][:STEPS] > 0][order])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_evaluation_is_not_augmented(files):
    batches = read(Pipeline(KINDS["records"](files), augment=jitter), steps=STEPS, seed=None)
    assert set(batches) == {"id", "double", "weight"}
    assert ids(batches) == list(range(N))


@pytest.mark.parametrize("kind", ["arrays", "records", "dataset"])
def test_a_resumed_stream_decodes_its_own_share_of_what_is_left_and_nothing_else(tmp_path, kind):
    n, batch, first_step = 2000, 4, 400  # 500 steps an epoch, far more than are decoded ahead
    names = write_records(tmp_path, 2, n=n)
    base: Any = {
        "arrays": {"id": np.arange(n)},
        "records": load_tfrecords(names),
        "dataset": tf.data.TFRecordDataset(names).apply(tf.data.experimental.assert_cardinality(n)),
    }[kind]
    decoded = []

    def note(element):
        example = {"id": element["id"]} if kind == "arrays" else {"id": decode(element)["id"]}
        tf.py_function(lambda number: decoded.append(int(number)), [example["id"]], [])
        return example

    stream = make_stream(Pipeline(base, map=note), name="train_data", global_batch_size=batch, seed=7)
    whole = read(Pipeline(base, map=None if kind == "arrays" else decode), steps=500, batch=batch)["id"]
    late = per_replica_batches(stream, tf.distribute.InputContext(2, 1, 2), first_step=first_step)
    for step, element in zip(range(3), late.as_numpy_iterator(), strict=False):
        np.testing.assert_array_equal(element["id"], whole[first_step + step, 2:])
    assert len(decoded) >= 6
    assert len(set(decoded)) == len(decoded)
    assert set(decoded) <= set(whole[first_step:, 2:].ravel().tolist())


def test_a_resumed_stream_reads_only_the_records_that_it_uses(tmp_path):
    name = str(tmp_path / "records")
    with tf.io.TFRecordWriter(name) as writer:
        for _ in range(20_000):
            writer.write(bytes(1000))
    stream = make_stream(
        Pipeline(load_tfrecords(name), map=lambda record: {"length": tf.strings.length(record)}),
        name="train_data",
        global_batch_size=4,
        seed=0,
    )
    batches = iter(per_replica_batches(stream, tf.distribute.InputContext(), first_step=4500).as_numpy_iterator())
    before = bytes_read()
    for _ in range(3):
        next(batches)
    assert 12_000 < bytes_read() - before < 2_000_000  # of 20 MB, with what is read ahead


def bytes_read():
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def test_variable_lengths_are_padded_and_longer_ones_refused(files):
    source = Pipeline(load_tfrecords(files[2]), map=decode_tokens, pad_to={"tokens": 4})
    tokens = in_memory(source)["tokens"]
    expected = [[number] * (number % 5) + [0] * (4 - number % 5) for number in range(N)]
    assert tokens.tolist() == expected
    short = Pipeline(source.source, map=decode_tokens, pad_to={"tokens": 3})
    with pytest.raises(UsageError, match="pad_to gives tokens the length 3, and an example is longer; give it a"):
        in_memory(short)
    task = dataclasses.replace(toy.make_task(RunConfig()), train_data=lambda: short, train_step=count_examples)
    _, _, call = toy.compiled(tf.distribute.get_strategy(), task)
    with pytest.raises(UsageError, match="pad_to gives tokens the length 3, and an example is longer; give it a"):
        call(10)


def count_examples(state, batch):
    return {"examples": mean(batch["weight"], batch["weight"])}


def test_padding_fills_any_leading_axes_and_types():
    lines = tf.ragged.constant([[[1.0], [2.0, 3.0]], [[4.0]]])
    source = tf.data.Dataset.from_tensor_slices((lines, ["ab", "c"])).map(
        lambda x, s: {"x": x.to_tensor(), "s": tf.strings.bytes_split(s)}
    )
    padded = in_memory(Pipeline(source, pad_to={"x": [2, 3], "s": 2}))
    assert padded["x"].tolist() == [[[1, 0, 0], [2, 3, 0]], [[4, 0, 0], [0, 0, 0]]]
    assert padded["s"].tolist() == [[b"a", b"b"], [b"c", b""]]


def test_batches_are_mapped_whole(files):
    spec = {"id": tf.io.FixedLenFeature([], tf.int64)}
    source = Pipeline(load_tfrecords(files[3]), map_batch=lambda batch: tf.io.parse_example(batch, spec))
    np.testing.assert_array_equal(in_memory(source)["id"], np.arange(N))
    for kind in (source, Pipeline(KINDS["dataset"](files).source, map_batch=source.map_batch)):
        assert sorted(ids(read(kind, steps=STEPS, workers=2, replicas=2))) == list(range(N))


def test_pipelines_nest_and_the_inner_map_comes_first():
    inner = Pipeline(arrays(), map=lambda x: {"id": x["id"] + 1})
    assert in_memory(Pipeline(inner, map=lambda x: {"id": 10 * x["id"]}))["id"].tolist() == [*range(10, 220, 10)]


def test_workers_compare_files_and_features(files):
    def described(names):
        return describe(make_stream(Pipeline(load_tfrecords(names), map=decode), name="d", global_batch_size=1, seed=0))

    whole = described(files[3])
    assert whole["examples"] == "21"
    assert whole["id"] == "int64 ()"
    assert whole["files"].startswith("3 from part-0.tfrecord, ")
    assert whole["files"] != described(files[3][1:])["files"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda f: load_tfrecords(f), "expected a flat dict of tensors an example"),
        (lambda f: Pipeline(load_tfrecords(f), map=decode_tokens), "expected a flat dict of tensors"),
        (
            lambda f: Pipeline(load_tfrecords(f), map=decode, pad_to={"tokens": 3}),
            "pad_to names 'tokens'; expected one",
        ),
        (lambda f: Pipeline(arrays(), pad_to={"id": 3}), "pad_to gives 'id' 1 lengths; it has the shape ()"),
        (lambda f: Pipeline(Pipeline(arrays(), augment=jitter)), "expected these in the outer one"),
        (lambda f: Pipeline(arrays(), map={"id": 1}), "map of a Pipeline is a dict; expected a function"),
        (lambda f: Pipeline([1, 2], map=decode), "train_data is a list; expected"),
    ],
)
def test_a_pipeline_that_cannot_work_is_refused(files, source, sentence):
    with pytest.raises(UsageError) as refusal:
        make_stream(source(files[2]), name="train_data", global_batch_size=BATCH, seed=0)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("keep", [in_memory, on_disk])
def test_what_is_kept_is_decoded_once_and_read_like_arrays(files, tmp_path, order_of_arrays, keep):
    decoded = []

    def count(record):
        example = decode(record)
        tf.py_function(lambda number: decoded.append(int(number)), [example["id"]], [])
        return example

    arguments = () if keep is in_memory else (tmp_path / "kept",)
    source = Pipeline(load_tfrecords(files[3]), map=count)
    kept = keep(source, *arguments)
    assert sorted(decoded) == list(range(N))
    batches = read(kept, steps=3 * STEPS, workers=2, replicas=2)
    np.testing.assert_array_equal(batches["double"], order_of_arrays["double"])
    augmented = read(Pipeline(kept, augment=jitter), steps=2)
    np.testing.assert_array_equal(augmented["id"], order_of_arrays["id"][:2])
    if keep is on_disk:
        again = keep(source, *arguments)
        assert isinstance(again["id"], np.memmap)
        np.testing.assert_array_equal(again["double"], 2 * np.arange(N))
    assert len(decoded) == N


def test_workers_of_one_host_may_write_the_same_folder_at_once(tmp_path):
    both_write = threading.Barrier(2, timeout=60)

    def wait(example):
        waited = tf.numpy_function(lambda: 0 * both_write.wait(), [], tf.int64)
        return {"id": example["id"] + tf.ensure_shape(waited, [])}

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(on_disk, Pipeline({"id": np.array([5])}, map=wait), tmp_path / "kept") for _ in range(2)]
        assert [writer.result()["id"].tolist() for writer in writers] == [[5], [5]]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_with_other_data_is_refused(files, tmp_path):
    folder = tmp_path / "kept"
    on_disk(Pipeline(load_tfrecords(files[1]), map=decode), folder)
    other = [
        Pipeline(load_tfrecords(files[2]), map=decode),
        Pipeline(load_tfrecords(files[1]), map=lambda record: {**decode(record), "double": tf.constant(3, tf.int64)}),
    ]
    for source in other:
        with pytest.raises(UsageError, match="holds other data than this pipeline makes, or other files; remove it"):
            on_disk(source, folder)
    with pytest.raises(UsageError, match="yields 'name' of type string; expected numbers"):
        on_disk({"name": np.array([b"a"])}, tmp_path / "strings")
    for keep in (in_memory, lambda source: on_disk(source, tmp_path / "augmented")):
        with pytest.raises(UsageError, match="has augment, which would be done once for all epochs"):
            keep(Pipeline(arrays(), augment=jitter))
