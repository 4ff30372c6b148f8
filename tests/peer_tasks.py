"""Small tasks on which the peers are compared with distloop, and how one of them trains."""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

from benchmarks import peers
from distloop import RunConfig, State, Task, mean, minimize, startup
from distloop.cluster import Cluster, from_tf_config
from distloop.data import per_replica_batches
from distloop.metrics import results
from distloop.steps import separate_seeds
from distloop.storage import as_path
from distloop.task import named_variables

DRAW = np.random.default_rng(0)
EXAMPLES = {
    "word": DRAW.integers(5, size=[32, 3]).astype(np.int32),
    "x": DRAW.normal(size=[32, 4]).astype(np.float32),
    "label": DRAW.integers(3, size=32).astype(np.int32),
}
TOKENS = {
    "x": DRAW.normal(size=[32, 6, 3]).astype(np.float32),
    "y": DRAW.normal(size=[32, 6]).astype(np.float32),
    "tokens": (np.arange(6) < DRAW.integers(1, 7, size=[32, 1])).astype(np.float32),
}


def classifier(config: RunConfig) -> Task:
    """Have all at once: an embedding with its sparse gradient, dropout, a penalty, a metric."""

    def build():
        words, x = keras.Input([3], dtype="int32"), keras.Input([4])
        embedded = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(words))
        hidden = keras.layers.Dense(8, "tanh", kernel_regularizer="l2")(keras.layers.concatenate([embedded, x]))
        logits = keras.layers.Dense(3, dtype="float32")(keras.layers.Dropout(0.2)(hidden))
        # Momentum keeps the size of gradients, which Adam would divide away.
        return State(model=keras.Model([words, x], logits), optimizer=keras.optimizers.SGD(0.1, momentum=0.9))

    def train_step(state, batch):
        def loss(batch):
            logits = state.model([batch["word"], batch["x"]], training=True)
            losses = keras.losses.sparse_categorical_crossentropy(batch["label"], logits, from_logits=True)
            correct = keras.metrics.sparse_categorical_accuracy(batch["label"], logits)
            return losses, {"accuracy": mean(correct, batch["weight"])}

        variables = state.model.trainable_variables
        return minimize(loss, batch, state.optimizer, variables, penalty=lambda: sum(state.model.losses))

    return Task(build, train_step, lambda: EXAMPLES)


def regression_of_tokens(config: RunConfig) -> Task:
    """Have a loss with a denominator of its own: replicas hold different numbers of tokens."""

    def build():
        model = keras.Sequential([keras.Input([6, 3]), keras.layers.Dense(1, use_bias=False)])
        return State(model=model, optimizer=keras.optimizers.SGD(0.1))

    def train_step(state, batch):
        def loss(batch):
            errors = tf.square(state.model(batch["x"], training=True)[..., 0] - batch["y"])
            return mean(errors, batch["tokens"] * batch["weight"][:, None])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return Task(build, train_step, lambda: TOKENS)


def train(peer, task, calls, *, workers=None, dataset_of=lambda dataset: dataset, **settings):
    """Train from the same weights on the same batches; return the mean loss of each call, and the weights."""
    workers = workers or Cluster()
    config = RunConfig(**{"global_batch_size": 8, "steps_per_call": 3, **settings})
    made = task if isinstance(task, str) else task(config)
    name, strategy = startup.start_strategy(made, config, workers)
    setup = startup.set_up(made, config, as_path("unused"), workers, name, strategy)
    stream = startup.train_stream(setup)
    separate_seeds(strategy, setup.state)
    if peer == "distloop":
        step = setup.task.train_step
        run = startup.compiled(setup, step, stream, first_step=0, training=True, stop=tf.Variable(0.0))
        losses = [results(run.metrics, run(steps).sums)["loss"] for steps in calls]
    else:
        dataset = strategy.distribute_datasets_from_function(
            lambda context: per_replica_batches(stream, context, first_step=0)
        )
        with peers.started(peer, setup, dataset_of(dataset)) as call:
            losses = [call(steps) for steps in calls]
    model = {name: value.numpy() for name, value in named_variables(setup.state).items() if name.startswith("model/")}
    return losses, {name: value for name, value in model.items() if "seed" not in name}


def main():
    """Train each peer that is named on a worker's command line; print a line of JSON for each."""
    workers = from_tf_config(os.environ["TF_CONFIG"])
    for peer in sys.argv[1:]:
        try:
            losses, weights = train(peer, classifier, (6, 6), workers=workers)
            found = {"losses": losses, "weights": {name: value.tolist() for name, value in weights.items()}}
        except Exception as error:
            found = {"error": peers.reason(error)}
        print(json.dumps({"peer": peer, **found}), flush=True)


if __name__ == "__main__":
    main()
