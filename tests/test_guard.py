"""A run whose numbers leave the finite stops by name, and its checkpoints stay finite."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import NotFiniteError, RunConfig, State, Task, minimize, train
from tests import toy

CONFIG = RunConfig(global_batch_size=4, epochs=4, strategy="default", steps_per_call=2)


def task_of(per_example, *, config=CONFIG, **more_parts):
    """Return a linear task with the loss `per_example(predictions, batch)`."""

    def build():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, dtype="float32")], name="net")
        variables = {name: tf.Variable(value) for name, value in more_parts.items()}
        return State(model=model, optimizer=keras.optimizers.SGD(0.1), **variables)

    def step(state, batch):
        def loss(b):
            return per_example(tf.cast(state.model(b["x"])[:, 0], tf.float32), {**b, "step": state.step})

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return Task(build, step, lambda: toy.DATA)


def stopped(tmp_path, per_example, **settings):
    config = dataclasses.replace(CONFIG, workdir=str(tmp_path / "run"), **settings)
    with pytest.raises(NotFiniteError) as stop:
        train(task_of(per_example), config)
    return str(stop.value)


def saved_values(tmp_path):
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    reader = tf.train.load_checkpoint(str(newest / "state"))
    return newest.name, {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def test_a_loss_that_stops_being_finite_is_named_with_its_step_and_the_first_variable(tmp_path):
    def loss(predictions, batch):
        return tf.square(predictions) * tf.where(batch["step"] >= 6, np.float32("nan"), 1.0)

    message = stopped(tmp_path, loss)
    assert message.startswith(
        "the metric 'loss' stopped being finite at step 7; the variable 'model/net/dense/kernel' is not finite either. "
    )
    name, values = saved_values(tmp_path)
    assert name == "step_00000006"
    assert all(np.isfinite(value).all() for value in values.values())
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["loss"]) == (8, None)  # what is seen last is still logged


def test_a_variable_that_stops_being_finite_is_named_before_a_checkpoint_keeps_it(tmp_path):
    def loss(predictions, batch):
        # finite, with a gradient that is not: d sqrt(x) at 0 is infinite
        return predictions + tf.where(batch["step"] >= 5, tf.sqrt(predictions - tf.stop_gradient(predictions)), 0.0)

    message = stopped(tmp_path, loss, epochs=2)
    assert message.startswith("the variable 'model/net/dense/kernel' is not finite at step 6. Lower the learning rate")
    assert saved_values(tmp_path)[0] == "step_00000003"


def test_an_optimizer_that_skips_step_after_step_is_named(tmp_path):
    message = stopped(
        tmp_path, lambda p, batch: tf.square(p) * 1e38, precision="mixed_float16", epochs=None, train_steps=100
    )
    assert message.startswith("the optimizer 'optimizer' skipped the last 5")
    assert "its gradients are not finite even at the lowest loss scale" in message


def test_an_infinity_that_the_user_keeps_on_purpose_stops_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, workdir=str(tmp_path / "run"))
    summary = train(task_of(lambda p, batch: tf.square(p - batch["y"]), best=np.float32("inf")), config)
    assert summary["steps"] == 12
