"""A tiny problem for tests: a linear model on 10 examples, with a run of it in the parts that `train` is made of."""

import keras
import numpy as np
import tensorflow as tf

from distloop import RunConfig, State, Task, mean, minimize
from distloop.data import make_stream
from distloop.inputs import distributed
from distloop.steps import compile_steps
from distloop.task import named_variables
from distloop.updates import prepare

GENERATOR = np.random.default_rng(0)
DATA = {"x": GENERATOR.normal(size=(10, 3)).astype(np.float32), "y": GENERATOR.normal(size=10).astype(np.float32)}


def make_task(config: RunConfig) -> Task:
    def build():
        keras.utils.set_random_seed(config.seed)
        dense = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([3]), *dense], name="net")
        return State(model=model, optimizer=keras.optimizers.Adam(config.learning_rate))

    def losses(state, batch, training):
        return tf.square(tf.cast(state.model(batch["x"], training=training)[:, 0], tf.float32) - batch["y"])

    def train_step(state, batch):
        return minimize(
            lambda b: losses(state, b, training=True), batch, state.optimizer, state.model.trainable_variables
        )

    def eval_step(state, batch):
        return {"loss": mean(losses(state, batch, training=False), batch["weight"])}

    return Task(build, train_step, lambda: DATA, eval_step, lambda: DATA)


def to_numpy(state):
    """Return a copy of every variable by name, from the first replica."""
    return {name: variable.numpy() for name, variable in named_variables(state).items()}


def compiled(strategy, task, *, batch_size=4, training=True):
    """Return the state, the stream and the compiled steps of a task."""
    keras.utils.clear_session()  # the same names of variables each time
    with strategy.scope():
        state = task.build()
        prepare(state, RunConfig())
    stream = make_stream(
        task.train_data(), name="train_data", global_batch_size=batch_size, seed=0 if training else None
    )
    dataset = distributed(strategy, stream, first_step=0)
    step = task.train_step if training else task.eval_step
    return state, stream, compile_steps(strategy, step, state, dataset, training=training, stop=tf.Variable(0.0))
