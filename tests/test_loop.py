import math
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig
from distloop.data import make_stream
from distloop.loop import evaluate_once, train_steps
from distloop.metrics import Metric, divide
from distloop.steps import CallResult
from tests import toy

TASK = toy.make_task(RunConfig(seed=0))


class Recorded:
    """Stand in for compiled steps with known sums: step s has the loss s, over one example."""

    metrics: ClassVar = {"loss": Metric((tf.constant(0.0), tf.constant(0.0)), divide)}

    def __init__(self, first_step=0):
        self.step = first_step

    def __call__(self, num_steps):
        steps = np.arange(self.step, self.step + num_steps, dtype=np.float64)
        self.step += num_steps
        return CallResult(num_steps, np.array([steps.sum(), num_steps]), np.zeros([1, 0]), -1, 0.0, False)


def stream():
    ten = {"x": np.zeros([10])}
    return make_stream(ten, name="ten examples", global_batch_size=4, seed=None)  # 3 steps an epoch


def test_calls_end_at_each_stop_each_epoch_and_the_end():
    progress = list(train_steps(Recorded(), stream(), start_step=0, total_steps=11, stops=(4, 10)))
    assert [p.step for p in progress] == [3, 4, 6, 8, 9, 10, 11]
    assert [p.epoch for p in progress] == [1, 2, 2, 3, 3, 4, 4]
    assert [p.examples for p in progress] == [10, 4, 6, 8, 2, 4, 4]


def test_means_are_over_the_call_and_over_the_epoch():
    progress = list(train_steps(Recorded(), stream(), start_step=0, total_steps=8, stops=(4,)))
    assert [p.metrics["loss"] for p in progress] == [1.0, 3.0, 4.5, 6.5]
    assert [p.epoch_metrics and p.epoch_metrics["loss"] for p in progress] == [1.0, None, 4.0, 6.5]


@pytest.mark.parametrize("stop", [3, 4, 6, 8])
def test_a_resumed_run_goes_on_with_the_calls_and_epochs_of_a_whole_one(stop):
    whole = list(train_steps(Recorded(), stream(), start_step=0, total_steps=11, stops=(4,)))
    (before,) = [p for p in whole if p.step == stop]
    rest = train_steps(
        Recorded(stop), stream(), start_step=stop, total_steps=11, stops=(4,), open_epoch=before.open_epoch
    )
    for resumed, expected in zip(rest, [p for p in whole if p.step > stop], strict=True):
        assert resumed._replace(seconds=0) == expected._replace(seconds=0)


def test_a_finished_run_has_no_calls_left():
    assert list(train_steps(Recorded(), stream(), start_step=5, total_steps=5, stops=(4,))) == []


def test_evaluation_is_the_mean_over_every_example(strategy):
    state, stream_, call = toy.compiled(strategy, TASK, training=False)
    evaluation = evaluate_once(call, stream_)
    errors = state.model.predict(toy.DATA["x"], verbose=0)[:, 0] - toy.DATA["y"]
    assert evaluation.counted == 10
    assert math.isclose(evaluation.metrics["loss"], np.mean(errors**2), rel_tol=1e-5)
    assert evaluate_once(call, stream_) == evaluation  # the next evaluation starts at the first example again
