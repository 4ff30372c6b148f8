"""FLOPs of the traced graph against counts by hand, and against TensorFlow's own profiler."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import flops, peaks
from distloop import RunConfig, State, Task, minimize
from distloop.task import load_task
from tests import toy


def counted(function, *shapes):
    traced = tf.function(function, autograph=False).get_concrete_function(*[tf.TensorSpec(s) for s in shapes])
    return flops.count(traced), traced.graph


def gradients_of(function):
    """Return the function that computes the gradients of the sum of `function` by all of its arguments."""

    def gradients(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            total = tf.reduce_sum(function(*arguments))
        return tape.gradient(total, arguments)

    return gradients


FORWARD = {
    "dense": (lambda x, w: x @ w, [(4, 5), (5, 7)], 2 * 4 * 5 * 7),
    "transposed": (lambda x, w: tf.matmul(x, w, True, True), [(5, 4), (7, 5)], 2 * 4 * 5 * 7),
    "batched": (lambda x, w: tf.matmul(x, w, transpose_a=True), [(3, 5, 4), (3, 5, 7)], 3 * 2 * 4 * 5 * 7),
    "attention": (
        lambda q, k: tf.einsum("bqhd,bkhd->bhqk", q, k),
        [(2, 6, 3, 4), (2, 8, 3, 4)],
        2 * 2 * 6 * 8 * 3 * 4,
    ),
    "ellipsis": (lambda x, w: tf.einsum("...d,df->...f", x, w), [(2, 3, 4), (4, 5)], 2 * 2 * 3 * 4 * 5),
    "reduction": (lambda x: tf.einsum("bij->bj", x), [(2, 3, 4)], 0),
    "same": (lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), [(2, 9, 7, 3), (3, 3, 3, 5)], 2 * 2 * 9 * 7 * 5 * 27),
    "strided": (lambda x, w: tf.nn.conv2d(x, w, 2, "SAME"), [(2, 9, 7, 3), (3, 3, 3, 5)], 2 * 2 * 5 * 4 * 5 * 27),
    "valid": (lambda x, w: tf.nn.conv2d(x, w, 2, "VALID"), [(2, 9, 7, 3), (3, 3, 3, 5)], 2 * 2 * 4 * 3 * 5 * 27),
    "grouped": (lambda x, w: tf.nn.conv2d(x, w, 1, "VALID"), [(2, 5, 5, 8), (3, 3, 2, 4)], 2 * 2 * 9 * 4 * 9 * 2),
    "depthwise": (
        lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "VALID"),
        [(2, 5, 5, 4), (3, 3, 4, 2)],
        2 * 2 * 9 * 8 * 9,
    ),
    "volume": (
        lambda x, w: tf.nn.conv3d(x, w, [1] * 5, "VALID"),
        [(2, 4, 5, 6, 3), (2, 2, 2, 3, 7)],
        2 * 2 * 3 * 4 * 5 * 7 * 24,
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_counts_are_those_by_hand_and_backward_is_twice_as_much(name):
    function, shapes, expected = FORWARD[name]
    assert counted(function, *shapes)[0] == expected
    # The result itself is not needed for the gradients of its sum.
    assert counted(gradients_of(function), *shapes)[0] == 2 * expected


def test_forward_counts_are_those_of_tensorflows_profiler():
    def forward(x, kernel, w):
        return tf.reshape(tf.nn.conv2d(x, kernel, 2, "SAME"), [4, -1]) @ w

    found, graph = counted(forward, (4, 8, 8, 3), (3, 3, 3, 6), (96, 10))
    options = tf.compat.v1.profiler.ProfileOptionBuilder(
        tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    ).with_empty_output()
    assert found == tf.compat.v1.profiler.profile(graph, options=options.build()).total_float_ops > 0


def test_functions_are_counted_with_what_they_call_a_loop_once_and_a_branch_by_its_larger_side():
    inner = tf.function(lambda a: a @ a, autograph=False)

    def outer(a, limit):
        def body(a):
            return tf.cond(a[0, 0] > 0, lambda: inner(a) @ a, lambda: inner(a))

        unused = a @ a @ a  # noqa: F841
        return tf.while_loop(lambda a: a[0, 0] < limit, body, [a])

    assert counted(outer, (4, 4), ())[0] == 2 * (2 * 4**3)


def test_a_shape_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="FLOPs are counted for fixed shapes only"):
        counted(lambda x, w: x @ w, (None, 4), (4, 4))


def perceptron():
    def build():
        layers = [keras.Input([3]), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(2)]
        return State(model=keras.Sequential(layers), optimizer=keras.optimizers.Adam())

    def train_step(state, batch):
        def loss(batch):
            return tf.reduce_sum(state.model(batch["x"]) ** 2, axis=1)

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return Task(build, train_step, lambda: {"x": np.ones([8, 3], np.float32)})


def test_a_compiled_step_counts_for_each_example_whatever_the_replicas(strategy):
    _, _, call = toy.compiled(strategy, perceptron(), batch_size=8)
    # Forward both layers, then their weights, then the input of the second.
    assert flops.per_example(call, 8) == 2 * ((3 * 5 + 5 * 2) + (3 * 5 + 5 * 2) + 5 * 2)


def test_the_null_task_computes_what_is_asked_for():
    task = load_task("null", RunConfig(task_args="gradient_bytes=40,flops=1e9"))
    _, _, call = toy.compiled(tf.distribute.get_strategy(), task, batch_size=4)
    assert flops.per_example(call, 4) == pytest.approx(1e9 / 4, rel=0.01)


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "expected"),
    [
        ("NVIDIA H200", "mixed_bfloat16", True, 989.5),
        ("NVIDIA H200", "mixed_float16", True, 989.5),
        ("NVIDIA H100 80GB HBM3", "float32", True, 494.5),
        ("NVIDIA H100 80GB HBM3", "float32", False, 67),
        ("NVIDIA A100-SXM4-40GB", "float32", True, 156),
        ("NVIDIA A100 80GB PCIe", "mixed_bfloat16", True, 312),
        ("Tesla V100-SXM2-16GB", "mixed_float16", True, 125),
        ("Tesla V100-SXM2-16GB", "float32", True, 15.7),
        ("Tesla V100-SXM2-16GB", "mixed_bfloat16", True, None),
        ("NVIDIA H200 MIG 1g.18gb", "float32", True, None),
        ("NVIDIA H100 PCIe", "float32", True, None),
        ("CPU", "float32", True, None),
    ],
)
def test_a_peak_is_of_the_device_and_the_precision_or_is_not_known(device, precision, tf32, expected):
    peak = peaks.find(device, precision, tf32=tf32)
    if expected is None:
        assert peak is None
    else:
        assert peak is not None
        assert peak.flops_per_second == pytest.approx(expected * 1e12)
        assert f"{expected} TFLOP/s, dense" in peak.source
