"""The larger tasks of the library: their sizes are those of the papers, and they train on every strategy."""

import importlib
import inspect
import json
import time
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from benchmarks import flops
from benchmarks.workloads import unit_of
from distloop import RunConfig, UsageError
from distloop.data import make_stream, per_replica_batches
from distloop.datasets import SAMPLE_DIR
from distloop.task import load_task
from distloop.tasks import names
from tests import harness, toy


def test_the_null_task_has_the_gradients_that_are_asked_for_and_trains(strategy):
    task = load_task("null", RunConfig(learning_rate=0.1, task_args="gradient_bytes=4000,flops=1e6"))
    state, _, call = toy.compiled(strategy, task)
    assert sum(4 * weight.shape.num_elements() for weight in state.model.trainable_variables) == 4000
    losses = [call(1).sums[0] for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0]


def test_the_batches_of_the_null_task_come_as_late_as_is_asked_for():
    source = load_task("null", RunConfig(task_args="input_ms=20")).train_data()
    stream = make_stream(source, name="train_data", global_batch_size=4, seed=0)
    batches = iter(per_replica_batches(stream, tf.distribute.InputContext(), first_step=0))
    began = time.perf_counter()
    next(batches)  # others are made at the same time, but none before its turn
    first = time.perf_counter()
    for _ in range(9):
        next(batches)
    assert first - began >= 0.02
    assert time.perf_counter() - began >= 10 * 0.02


# Their real sizes, with the sources of the numbers in docs/benchmarks/workloads.md
PARAMETERS = {
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "dlrm_small": 356_934_465,
    "gpt2_124m": 124_439_808,
    "gpt_350m": 354_823_168,
    "mnist_cnn": 2_770_634,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vit_b16": 86_567_656,
}
SPARSE = {"dlrm_small": 64 * 5_569_296}  # in tables of which a step exchanges only some rows
SMALL = {
    "bert_base": "layers=1,width=16,heads=2,vocabulary=50,length=8,predictions=3,dropout=0.0,examples=8",
    "dlrm_small": "rows=50,width=8,dense=16,examples=8",
    "gpt2_124m": "layers=1,width=16,heads=2,vocabulary=50,length=8,dropout=0.0,examples=8",
    "resnet50": "blocks=1-1,width=4,image_size=32,classes=10,examples=8",
    "vgg16": "width=2,dense=8,image_size=32,classes=10,dropout=0.0,examples=8",
    "vit_b16": "layers=1,width=16,heads=2,patch=16,image_size=32,classes=10,dropout=0.0,examples=8",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("bert_large", "gpt_350m") else name for name in PARAMETERS],
)
def test_a_workload_has_the_parameters_of_its_paper(name):
    with tf.Graph().as_default():  # where variables take no memory
        state = load_task(name, RunConfig()).build()
    assert sum(weight.shape.num_elements() for weight in state.model.trainable_variables) == PARAMETERS[name]


def small(name, **settings):
    return load_task(name, RunConfig(task_args=SMALL[name], **settings))


@pytest.mark.parametrize(
    "name",
    [name if name in ("dlrm_small", "gpt2_124m") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL],
)
def test_a_small_workload_learns_and_is_the_same_on_two_replicas(name, mirrored):
    found = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        keras.utils.set_random_seed(1)
        _, _, call = toy.compiled(strategy, small(name), batch_size=8)
        found.append([call(1).sums[0] for _ in range(3)])
        if name == "gpt2_124m":  # by hand: the blocks' dense layers, attention, the head; backward is twice as much
            assert flops.per_example(call, 8) == 3 * (24 * 8 * 16**2 + 4 * 8**2 * 16 + 2 * 8 * 16 * 50)
        operations = {node.op for f in call.traced.graph.as_graph_def().library.function for node in f.node_def}
        updates_rows = any(operation.startswith("ResourceScatter") for operation in operations)
        assert updates_rows == (name == "dlrm_small")
    one, two = found
    assert np.isfinite(one).all()
    assert one[2] < one[0]
    if name != "resnet50":  # whose replicas normalize by their own parts of the batch
        np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_workload_runs_in_16_bits_and_compiled(name, tmp_path):
    for settings in (["--precision=mixed_bfloat16"], ["--precision=mixed_float16", "--jit_compile"]):
        workdir = tmp_path / settings[0]
        flags = [f"--task={name}", f"--task_args={SMALL[name]}", "--global_batch_size=8", "--train_steps=2", *settings]
        code, _, err = harness.run("-m", "launch.train", f"--workdir={workdir}", *flags, limit_secs=400)
        assert code == 0, err
        assert json.loads((workdir / "summary.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_the_real_resnet_multiplies_as_often_as_its_paper_says():
    with tf.Graph().as_default():
        model = load_task("resnet50", RunConfig()).build().model
        forward = tf.function(model, autograph=False).get_concrete_function(tf.TensorSpec([1, 224, 224, 3]))
    assert flops.count(forward) == 2 * 4_089_184_256  # multiply-adds, https://pytorch.org/vision: 4.09 "GFLOPS"


def first_batch(task):
    stream = make_stream(task.train_data(), name="train_data", global_batch_size=4, seed=0)
    return next(iter(per_replica_batches(stream, tf.distribute.InputContext(), first_step=0)))


@pytest.mark.parametrize("data_dir", [None, str(SAMPLE_DIR)])
def test_images_of_any_set_come_in_the_size_of_the_model(data_dir):
    batch = first_batch(small("vit_b16", data_dir=data_dir))
    assert (batch["image"].shape, batch["image"].dtype) == ([4, 32, 32, 3], tf.uint8)
    assert batch["image"].numpy().std() > 10
    assert batch["label"].shape == [4]


def test_a_decoder_reads_the_bytes_of_a_text(tmp_path):
    text = "".join(chr(97 + i % 23) for i in range(100))
    write_tfds(tmp_path, "verses", text)
    tokens = first_batch(small("gpt2_124m", data_dir=str(tmp_path), dataset="verses"))["tokens"].numpy()
    assert {bytes(row.tolist()).decode() for row in tokens} <= {text[i * 9 : i * 9 + 9] for i in range(11)}
    with pytest.raises(UsageError, match="'mnist' has the features image, label; expected one with a text, such as"):
        small("gpt2_124m", data_dir=str(SAMPLE_DIR)).train_data()


def write_tfds(folder, name, text):
    """Write a prepared data set of one example of text."""
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[1],
        num_bytes=len(text),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder / name / "1.0.0", dataset_name=name, split="train", filetype_suffix="tfrecord"
        ),
    )
    (folder / name / "1.0.0").mkdir(parents=True)
    with tf.io.TFRecordWriter(str(folder / name / "1.0.0" / f"{name}-train.tfrecord-00000-of-00001")) as writer:
        writer.write(features.serialize_example({"text": text}))
    tfds.folder_dataset.write_metadata(data_dir=folder / name / "1.0.0", features=features, split_infos=[split])


def test_bert_reads_the_records_of_its_authors(tmp_path):
    made_up: Any = small("bert_base").train_data()
    with tf.io.TFRecordWriter(str(tmp_path / "part.tfrecord")) as writer:
        for row in range(8):
            feature = {
                name: tf.train.Feature(float_list=tf.train.FloatList(value=values[row]))
                if values.dtype == np.float32
                else tf.train.Feature(int64_list=tf.train.Int64List(value=values[row]))
                for name, values in made_up.items()
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    batch = first_batch(small("bert_base", data_dir=str(tmp_path)))
    rows = [made_up["input_ids"].tolist().index(tokens) for tokens in batch["input_ids"].numpy().tolist()]
    for name, values in made_up.items():
        np.testing.assert_array_equal(batch[name].numpy(), values[rows])


def test_made_up_clicks_are_not_passed_off_as_the_users_data():
    with pytest.raises(UsageError, match="data_dir is real, but dlrm_small has made-up clicks only; drop it"):
        small("dlrm_small", data_dir="real")


PAGE = (harness.ROOT / "docs/benchmarks/workloads.md").read_text()
ROWS = {row.split("`")[1]: row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| `")}


def test_the_page_says_what_the_workloads_are():
    assert list(ROWS) == sorted(set(names()) - {"mnist_tutorial"})
    for name, (_, parameters, gradients, unit, arguments, _) in ROWS.items():
        count, sparse = PARAMETERS.get(name, 1_000_000), SPARSE.get(name, 0)
        assert parameters == f"{count:,}"
        assert gradients.startswith(f"{4 * (count - sparse) / 1e6:,.1f} MB")
        function = importlib.import_module(f"distloop.tasks.{name}").make_task
        defaults = list(inspect.signature(function).parameters.values())[1:]
        assert arguments == (", ".join(f"`{one.name}={one.default}`" for one in defaults) or "none")
        if name in SMALL:
            features = make_stream(small(name).train_data(), name="data", global_batch_size=8, seed=0).features
            plural, of_an_example = unit_of(name, features)
            assert unit.startswith(plural)
            assert of_an_example == (8 if plural == "tokens" else 1)
