"""The peers train what distloop trains: the same weights after the same steps, or they say why not."""

import functools
import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import peers
from benchmarks.cases import PEERS
from distloop import RunConfig, State, Task
from distloop.errors import UsageError
from tests import peer_tasks
from tests.harness import run_workers
from tests.peer_tasks import TOKENS, classifier, regression_of_tokens, train

ONE_DEVICE, TWO_REPLICAS = {"strategy": "default"}, {"strategy": "mirrored", "replicas": 2}
CALLS = (6, 6)  # of two compiled calls each
slow = pytest.mark.slow


def trained(peer, task, calls, **settings):
    if peer == "orbit":
        try:
            peers.check_installed(peer)
        except UsageError as error:
            pytest.skip(str(error))
    return train(peer, task, calls, **settings)


@functools.cache
def reference(task, calls, **settings):
    return train("distloop", task, calls, **settings)


def assert_equal(found, expected):
    (losses, weights), (expected_losses, expected_weights) = found, expected
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("peer", "place"),
    [
        pytest.param("loop", ONE_DEVICE, marks=slow),
        ("loop_in_graph", ONE_DEVICE),
        pytest.param("fit", ONE_DEVICE, marks=slow),
        ("fit_many", ONE_DEVICE),
        pytest.param("orbit", ONE_DEVICE, marks=slow),
        ("loop", TWO_REPLICAS),
        pytest.param("loop_in_graph", TWO_REPLICAS, marks=slow),
        ("fit", TWO_REPLICAS),
        pytest.param("orbit", TWO_REPLICAS, marks=slow),
    ],
)
def test_a_peer_trains_the_same_weights(peer, place):
    assert_equal(trained(peer, classifier, CALLS, **place), reference(classifier, CALLS, **place))


@pytest.mark.parametrize("peer", ["loop", pytest.param("fit", marks=slow)])
def test_a_loss_over_tokens_is_divided_by_those_of_all_replicas(peer):
    # One batch is all of the data, so that its order does not matter.
    losses, weights = train(peer, regression_of_tokens, (1,) * 4, global_batch_size=32, **TWO_REPLICAS)
    _, start = train("distloop", regression_of_tokens, ())
    (kernel,) = start.values()
    x, y, share = TOKENS["x"], TOKENS["y"], TOKENS["tokens"] / TOKENS["tokens"].sum()
    for loss in losses:
        error = x @ kernel[:, 0] - y
        assert loss == pytest.approx((share * error**2).sum(), rel=1e-5)
        kernel = kernel - 0.1 * 2 * np.einsum("bt,btf->f", share * error, x)[:, None]
    np.testing.assert_allclose(*weights.values(), kernel, rtol=1e-5)


@slow
def test_many_steps_an_execution_of_fit_on_two_replicas_end_with_the_error_of_keras():
    # If this fails because Keras can do it, a paragraph in docs/benchmarks/peers.md is to go.
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        train("fit_many", classifier, CALLS, **TWO_REPLICAS)
    reason = peers.reason(caught.value)
    assert reason.startswith("InvalidArgumentError: You must feed a value for placeholder tensor")
    assert "\n" not in reason


@slow
@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        *((peer, {}) for peer in PEERS[1:]),
        *((peer, {"precision": "mixed_bfloat16"}) for peer in ("loop", "fit")),
        *((peer, {"jit_compile": True}) for peer in ("loop_in_graph", "fit_many")),
    ],
)
def test_ten_steps_of_mnist_cnn_have_losses_as_equal_as_a_comparison_asks_for(peer, settings):
    settings = {"global_batch_size": 64, "seed": 1, **settings}
    expected, _ = reference("mnist_cnn", (1,) * 10, **settings)
    losses, _ = trained(peer, "mnist_cnn", (1,) * 10, **settings)
    print(peer, settings, max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)))
    assert peers.differences({"distloop": expected, peer: losses}, settings.get("precision", "float32")) == []
    assert losses[-1] < 0.5 * losses[0]


@slow
@pytest.mark.parametrize("peer", ["loop", "fit"])
@pytest.mark.parametrize(
    ("workload", "task_args"),
    [
        ("bert_base", "layers=1,width=16,heads=2,vocabulary=50,length=8,predictions=3,examples=32"),
        ("dlrm_small", "rows=50,width=4,dense=16,examples=32"),
        ("gpt2_124m", "layers=1,width=16,heads=2,vocabulary=50,length=8,examples=32"),
        ("resnet50", "blocks=1-1,width=4,image_size=32,classes=10,examples=32"),
        ("null", "gradient_bytes=4000,examples=32"),
    ],
)
def test_the_workloads_of_the_library_have_equal_losses_on_two_replicas(peer, workload, task_args):
    settings = {"task_args": task_args, "learning_rate": 0.01, **TWO_REPLICAS}
    expected, _ = reference(workload, (1,) * 4, **settings)
    losses, _ = train(peer, workload, (1,) * 4, **settings)
    assert peers.differences({"distloop": expected, peer: losses}, "float32") == []


@slow
@pytest.mark.parametrize("peer", ["loop", "fit"])
@pytest.mark.parametrize("place", [ONE_DEVICE, TWO_REPLICAS])
def test_a_peer_with_a_loss_scale_has_the_same_losses(peer, place):
    settings = {"precision": "mixed_float16", **place}
    expected, _ = reference(classifier, (1,) * 10, **settings)
    losses, _ = train(peer, classifier, (1,) * 10, **settings)
    print(peer, settings, max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)))
    assert peers.differences({"distloop": expected, peer: losses}, "mixed_float16") == []


@slow
def test_a_learning_rate_that_differs_by_a_thousandth_is_seen_after_ten_steps():
    settings = {"global_batch_size": 64, "seed": 1}
    expected, _ = reference("mnist_cnn", (1,) * 10, **settings)
    losses, _ = train("loop", "mnist_cnn", (1,) * 10, learning_rate=1.001e-3, **settings)
    assert len(peers.differences({"distloop": expected, "loop": losses}, "float32")) == 1


@slow
@pytest.mark.parametrize("peer", ["loop", "loop_in_graph", "orbit"])
def test_a_peer_with_xla_on_two_replicas_trains_the_same_weights(peer):
    settings = {"jit_compile": True, **TWO_REPLICAS}
    assert_equal(trained(peer, classifier, CALLS, **settings), reference(classifier, CALLS, **settings))


@slow
def test_on_two_workers_loops_and_orbit_train_the_same_weights_and_fit_ends_with_the_error_of_keras():
    others = [peer for peer in PEERS if peer != "fit_many"]
    found = run_workers(["-m", "tests.peer_tasks", *others], workers=2)
    for code, out, err in found:
        assert code == 0, err
        rows = {line["peer"]: line for line in map(json.loads, out.splitlines())}
        expected = rows["distloop"]
        for peer in ("loop", "loop_in_graph", "orbit"):
            if "is not installed" not in rows[peer].get("error", ""):
                assert_equal((rows[peer]["losses"], rows[peer]["weights"]), (expected["losses"], expected["weights"]))
        assert "PerReplica" in rows["fit"]["error"]


def test_a_peer_that_is_not_installed_is_told_in_one_sentence(monkeypatch):
    for module in ("orbit", "tf_keras"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)  # which is how Python is told that there is none
            with pytest.raises(UsageError) as caught:
                peers.started("orbit", None, None)
        assert str(caught.value).startswith(
            "the peer orbit is not installed; pip install --no-deps 'tf-models-official==2.20.*' 'tf-keras==2.21.*'"
        )


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"loop": [2.0, 1.0]}, []),
        ({"loop": [2.0, 1.000009]}, []),
        (
            {"fit": [2.0, 1.0], "orbit": [2.0, 1.00002]},
            ["orbit has the loss 1.00002 after step 2 where distloop has 1, which differs by more than 1e-05"],
        ),
        ({"fit": [2.0, float("nan")]}, ["fit has the loss nan after step 2"]),
        ({"fit": [2.0]}, ["fit has the losses of 1 steps and distloop of 2."]),
        ({"fit": [], "loop": [4.0, 1.0]}, ["fit has the losses of 0", "loop has the loss 4 after step 1"]),
    ],
)
def test_who_does_not_train_alike_is_named(others, told):
    sentences = peers.differences({"distloop": [2.0, 1.0], **others}, "float32")
    assert len(sentences) == len(told)
    for sentence, beginning in zip(sentences, told, strict=True):
        assert sentence.startswith(beginning)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such thing", "ValueError: no such thing"),
        ("", "ValueError: "),
        (
            'Graph execution error:\n\nDetected at node a defined at:\n  File "a.py", line 1\n'
            "2 root error(s) found.\n  (0) INVALID_ARGUMENT:  You must feed it\n\t [[{{node while}}]]\n",
            "ValueError: You must feed it",
        ),
        (
            'Graph execution error:\n\n  File "a.py", line 1\n\nTrying to access x\n Cf. y',
            "ValueError: Trying to access x",
        ),
    ],
)
def test_the_reason_of_an_error_is_one_line(text, line):
    assert peers.reason(ValueError(text)) == line


def test_a_step_that_the_loss_scale_of_distloop_skips_is_not_compared():
    losses = {"distloop": [float("nan"), 2.0], "loop": [3.0, 2.0]}
    assert peers.differences(losses, "mixed_float16") == []
    assert len(peers.differences(losses, "mixed_bfloat16")) == 1


def two_optimizers(config: RunConfig) -> Task:
    def build():
        state = classifier(config).build()
        second = keras.optimizers.SGD()
        second.build(state.model.trainable_variables)
        return State(**state.parts, second=second)

    return Task(build, classifier(config).train_step, lambda: peer_tasks.EXAMPLES)


def without_minimize(config: RunConfig) -> Task:
    return Task(classifier(config).build, lambda state, batch: {}, lambda: peer_tasks.EXAMPLES)


@pytest.mark.parametrize(
    ("task", "settings", "told"),
    [
        (classifier, {"clip_norm": 1.0}, "clip_norm is 1.0, which only distloop follows"),
        (classifier, {"micro_batches": 2}, "micro_batches is 2, which only distloop follows"),
        (two_optimizers, {}, "the task has 2 optimizers; the peers train tasks with one."),
        (without_minimize, {}, "the task's train step does not call minimize"),
    ],
)
def test_what_a_peer_cannot_do_is_told_in_one_sentence(task, settings, told):
    with pytest.raises(UsageError, match=told):
        train("fit_many", task, (1,), **settings)


def test_batches_held_on_the_device_are_refused():
    with pytest.raises(UsageError, match="use --mode=h2d"):
        train("loop", classifier, (1,), dataset_of=lambda dataset: object())
