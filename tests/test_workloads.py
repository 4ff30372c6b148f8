"""The larger tasks of the library: their sizes are those of the papers, and they train on every strategy."""

import time

import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig
from distloop.data import make_stream, per_replica_batches
from distloop.task import load_task
from tests import toy


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
SMALL = {
    "bert_base": "layers=1,width=16,heads=2,vocabulary=50,length=8,predictions=3,dropout=0.0,examples=8",
    "dlrm_small": "rows=50,width=8,dense=16,examples=8",
    "gpt2_124m": "layers=1,width=16,heads=2,vocabulary=50,length=8,dropout=0.0,examples=8",
    "resnet50": "blocks=1-1,width=4,image_size=32,classes=10,examples=8",
    "vgg16": "width=2,dense=8,image_size=32,classes=10,dropout=0.0,examples=8",
    "vit_b16": "layers=1,width=16,heads=2,patch=16,image_size=32,classes=10,dropout=0.0,examples=8",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_workload_has_the_parameters_of_its_paper(name):
    with tf.Graph().as_default():  # where variables take no memory
        state = load_task(name, RunConfig()).build()
    assert sum(weight.shape.num_elements() for weight in state.model.trainable_variables) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_workload_learns_and_is_the_same_on_two_replicas(name, mirrored):
    found = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        tf.keras.utils.set_random_seed(1)
        _, _, call = toy.compiled(strategy, load_task(name, RunConfig(task_args=SMALL[name])), batch_size=8)
        found.append([call(1).sums[0] for _ in range(3)])
    one, two = found
    assert np.isfinite(one).all()
    assert one[2] < one[0]
    if name != "resnet50":  # whose replicas normalize by their own parts of the batch
        np.testing.assert_allclose(two, one, rtol=1e-5)
