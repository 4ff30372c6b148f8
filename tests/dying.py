"""A task that has all there is to lose, in a process that kills itself with SIGKILL at a chosen moment.

`--task=tests.dying:everything`; DISTLOOP_TEST_DIES=MOMENT:NUMBER names the moment, DISTLOOP_TEST_RANKS=0,1 the workers.
`:same_on_all` is the part whose numbers do not depend on the number of replicas.

| moment | NUMBER |
| --- | --- |
| `import`, `build`, `built`, `trace` | 1: the task is imported, builds, has built, the step is traced |
| `begin`, `end` | the step, before its forward pass or after its update (1 is the first) |
| `eval` | the batch of evaluation in this process |
| `save` | the n-th operation of this process in `checkpoints`: a folder made, a file opened, renamed or removed |
| `file` | the same elsewhere in the workdir |
"""

import dataclasses
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from distloop import RunConfig, State, Task, gather, mean, minimize
from distloop.cluster import from_tf_config

DIES, RANKS = "DISTLOOP_TEST_DIES", "DISTLOOP_TEST_RANKS"
EXAMPLES, BATCH = 42, 8  # six steps an epoch, the last of them with six examples of padding
EVAL_BATCHES = 3
ROWS = np.random.default_rng(0)
DATA = {
    "id": np.arange(EXAMPLES, dtype=np.int64),
    "x": ROWS.normal(size=(EXAMPLES, 6)).astype(np.float32),
    "y": ROWS.normal(size=EXAMPLES).astype(np.float32),
}
EVAL_DATA = {name: array[:20] for name, array in DATA.items()}
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")


def reached(moment: str, number: int) -> None:
    """End this process if it was chosen to end here."""
    if os.environ.get(DIES) != f"{moment}:{number}":
        return
    if str(from_tf_config(os.environ.get("TF_CONFIG")).index) in os.environ[RANKS].split(","):
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # in another thread than the one that takes the signal


reached("import", 1)


def watch_files(folder: Path) -> None:
    """Count this process's operations on files in `folder`. Python tells of each before it does it."""
    lock, counts = threading.Lock(), {"save": 0, "file": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[0])
        if path.is_relative_to(folder):
            moment = "save" if path.is_relative_to(folder / "checkpoints") else "file"
            with lock:
                counts[moment] += 1
                reached(moment, counts[moment])

    sys.addaudithook(hook)


def everything(config: RunConfig) -> Task:
    import keras
    import tensorflow as tf

    # From here on, which is after the strategy is made and before the checkpoint is read.
    watch_files(Path(config.workdir or "no workdir"))

    def build() -> State:
        reached("build", 1)
        layers = [
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential([keras.Input([6]), *layers], name="net")
        state = State(
            model=model,
            optimizer=keras.optimizers.Adam(0.01),
            order=_int64("order"),
            noise=keras.random.SeedGenerator(7),
        )
        reached("built", 1)
        return state

    def train_step(state: State, batch: dict[str, Any]) -> Any:
        def loss(batch: dict[str, Any]) -> Any:
            noisy = batch["x"] + keras.random.normal(tf.shape(batch["x"]), stddev=0.01, seed=state.noise)
            score = tf.cast(state.model(noisy, training=True)[:, 0], tf.float32)
            right = tf.cast((score > 0) == (batch["y"] > 0), tf.float32)
            return tf.square(score - batch["y"]), {"sign": mean(right, batch["weight"])}

        return _step(state, batch, loss)

    def eval_step(state: State, batch: dict[str, Any]) -> Any:
        count = itertools.count(1)
        tf.numpy_function(lambda: reached("eval", next(count)), [], [])
        score = tf.cast(state.model(batch["x"], training=False)[:, 0], tf.float32)
        return {
            "loss": mean(tf.square(score - batch["y"]), batch["weight"]),
            "scores": gather(lambda scores: float(scores.sum()), score, weight=batch["weight"]),
        }

    return Task(build, train_step, lambda: DATA, eval_step, lambda: EVAL_DATA)


def same_on_all(config: RunConfig) -> Task:
    """Return the task without dropout, noise and statistics of a replica's own examples, in plain float32."""
    import keras
    import tensorflow as tf

    def build() -> State:
        layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([6]), *layers], name="net")
        return State(model=model, optimizer=keras.optimizers.Adam(0.01), order=_int64("order"))

    def train_step(state: State, batch: dict[str, Any]) -> Any:
        return _step(state, batch, lambda b: tf.square(state.model(b["x"], training=True)[:, 0] - b["y"]))

    def eval_step(state: State, batch: dict[str, Any]) -> Any:
        return {"loss": mean(tf.square(state.model(batch["x"])[:, 0] - batch["y"]), batch["weight"])}

    return dataclasses.replace(everything(config), build=build, train_step=train_step, eval_step=eval_step)


def _int64(name: str) -> Any:
    import tensorflow as tf

    first = tf.VariableAggregation.ONLY_FIRST_REPLICA  # all replicas assign the same
    return tf.Variable(tf.constant(0, tf.int64), trainable=False, name=name, aggregation=first)


def _step(state: State, batch: dict[str, Any], loss: Any) -> Any:
    import tensorflow as tf

    reached("trace", 1)
    step = state.step + 1
    tf.numpy_function(lambda n: reached("begin", n), [step], [])
    # What the step has seen, in order: of each example its id and its place in the global batch, and what was before.
    context = tf.distribute.get_replica_context()
    size = tf.shape(batch["id"], out_type=tf.int64)[0]
    places = tf.cast(context.replica_id_in_sync_group, tf.int64) * size + tf.range(size)
    seen = tf.reduce_sum(tf.where(batch["weight"] > 0, (batch["id"] + 1) * (places * 2654435761 + 97), 0))
    state.order.assign(state.order * 31 + context.all_reduce("sum", seen))
    metrics = minimize(loss, batch, state.optimizer, state.model.trainable_variables)
    tf.numpy_function(lambda n: reached("end", n), [step], [])
    return metrics
