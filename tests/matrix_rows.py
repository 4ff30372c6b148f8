"""The rows of the equivalence matrix: small tasks, each with one thing that other frameworks get wrong.

Models are smooth (tanh), so that rounding cannot tip a kink and what differs is arithmetic alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distloop import RunConfig, State, Task, mean, minimize

STEPS = 20
BATCH = 16
GENERATOR = np.random.default_rng(7)
X = GENERATOR.normal(size=[64, 6]).astype(np.float32)
Y = np.tanh(X @ GENERATOR.normal(size=[6]).astype(np.float32)) + 0.1 * GENERATOR.normal(size=64).astype(np.float32)
IDS = GENERATOR.integers(0, 12, size=[64, 5])
LENGTHS = GENERATOR.integers(0, 6, size=64)  # some sequences have no token at all
MASK = (np.arange(5) < LENGTHS[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Row:
    """One row: how to build the task, the settings of the run, and the tolerance if it is not float32."""

    make_task: Callable[[], Task]
    config: dict[str, Any] = field(default_factory=dict)
    epsilon: float | None = None  # of a 16-bit type


def dense(units: int, **settings: Any) -> keras.layers.Layer:
    return keras.layers.Dense(units, activation="tanh", **settings)


def sequential(*layers: keras.layers.Layer, inputs: int = 6) -> keras.Model:
    return keras.Sequential([keras.Input([inputs]), *layers], name="net")


def mlp(**settings: Any) -> keras.Model:
    return sequential(dense(8, **settings), keras.layers.Dense(1, dtype="float32", **settings))


def linear() -> keras.Model:
    return sequential(keras.layers.Dense(1))


def regression(
    make_model: Callable[[], keras.Model] = mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = lambda: keras.optimizers.SGD(0.05),
    *,
    examples: int = 64,
    weights: bool = False,
    penalized: bool = False,
    transform: Any = None,
) -> Task:
    """Least squares; the loss is weighted by the data's own weights if asked for."""
    data = {"x": X[:examples], "y": Y[:examples]}
    if weights:
        data["weight"] = (np.arange(examples) % 5 / 2).astype(np.float32)

    def train_step(state: State, batch: Any) -> Any:
        return minimize(
            lambda b: tf.square(tf.cast(state.model(b["x"], training=True)[:, 0], tf.float32) - b["y"]),
            batch,
            state.optimizer,
            state.model.trainable_variables,
            penalty=(lambda: sum(state.model.losses)) if penalized else None,
            transform=transform,
        )

    return Task(lambda: State(model=make_model(), optimizer=make_optimizer()), train_step, lambda: data)


def sequences(make_layers: Callable[[], list[keras.layers.Layer]]) -> Task:
    """Predict the next token of masked sequences; the denominator is the number of tokens."""

    def build() -> State:
        return State(
            model=keras.Sequential(
                [keras.Input([4], dtype="int32"), *make_layers(), keras.layers.Dense(12)], name="net"
            ),
            optimizer=keras.optimizers.Adam(0.02),
        )

    def train_step(state: State, batch: Any) -> Any:
        def loss(b: Any) -> Any:
            logits = state.model(b["ids"][:, :-1], training=True)
            losses = keras.losses.sparse_categorical_crossentropy(b["ids"][:, 1:], logits, from_logits=True)
            return mean(losses, b["mask"][:, 1:] * b["weight"][:, None])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    return Task(build, train_step, lambda: {"ids": IDS, "mask": MASK})


def gan() -> Task:
    """Two models, two optimizers, two critic updates a step; noise is data, so that all columns draw the same."""

    def build() -> State:
        generator = keras.Sequential([keras.Input([3]), dense(6), keras.layers.Dense(6)], name="generator")
        critic = keras.Sequential([keras.Input([6]), dense(6), keras.layers.Dense(1)], name="critic")
        optimizers = keras.optimizers.Adam(0.02), keras.optimizers.Adam(0.01)
        optimizers[0].build(generator.trainable_variables)
        optimizers[1].build(critic.trainable_variables)
        return State(generator=generator, critic=critic, g_optimizer=optimizers[0], c_optimizer=optimizers[1])

    def train_step(state: State, batch: Any) -> Any:
        def critic_loss(b: Any) -> Any:
            fake = state.generator(b["noise"], training=True)
            return tf.nn.softplus(state.critic(fake)[:, 0]) + tf.nn.softplus(-state.critic(b["x"])[:, 0])

        def generator_loss(b: Any) -> Any:
            return tf.nn.softplus(-state.critic(state.generator(b["noise"], training=True))[:, 0])

        critic = state.critic.trainable_variables
        metrics = {}
        for _ in range(2):
            metrics |= minimize(critic_loss, batch, state.c_optimizer, critic, name="critic")
        generator = state.generator.trainable_variables
        return metrics | minimize(generator_loss, batch, state.g_optimizer, generator, name="generator")

    return Task(build, train_step, lambda: {"x": X, "noise": np.roll(X, 7, axis=0)[:, :3]})


class Nested(keras.Model):
    """A subclassed model with a frozen layer, a model inside, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.frozen = keras.layers.Dense(6, trainable=False)
        self.inner = sequential(dense(6))
        self.shared = dense(6)
        self.head = keras.layers.Dense(1)
        self.build((None, 6))

    def build(self, shape: Any) -> None:
        for layer in (self.frozen, self.shared, self.head):
            layer.build((None, 6))
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(self.shared(self.shared(self.inner(self.frozen(x)))))


def two_optimizers() -> Task:
    """One model whose layers have an optimizer each."""

    def build() -> State:
        model = mlp()
        low, high = keras.optimizers.SGD(0.05), keras.optimizers.Adam(0.01)
        low.build(model.layers[0].trainable_variables)
        high.build(model.layers[1].trainable_variables)
        return State(model=model, low=low, high=high)

    def train_step(state: State, batch: Any) -> Any:
        def loss(b: Any) -> Any:
            return tf.square(state.model(b["x"], training=True)[:, 0] - b["y"])

        low, high = (layer.trainable_variables for layer in state.model.layers)
        first = minimize(loss, batch, state.low, low, name="low")
        return first | minimize(loss, batch, state.high, high, name="high")

    return Task(build, train_step, lambda: {"x": X, "y": Y})


def centralize(gradients: list[tf.Tensor], variables: list[keras.Variable]) -> list[tf.Tensor]:
    """Take the mean out of each gradient and add a pull to zero: what a user's transform may do."""
    return [g - tf.reduce_mean(g) + 0.01 * v for g, v in zip(gradients, variables, strict=True)]


def schedule() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, decay_steps=15, warmup_steps=3))


def batch_norm() -> keras.Model:
    return sequential(dense(8), keras.layers.BatchNormalization(synchronized=True), keras.layers.Dense(1))


def no_dropout() -> keras.Model:
    return sequential(dense(8), keras.layers.Dropout(0.0), keras.layers.Dense(1))


def threes_and_sixes() -> Task:
    """The loss x * w of examples 3, 6, 3, 6: clipped to norm 1, each step of rate 1 moves w by 1."""

    def build() -> State:
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        return State(model=keras.Sequential([keras.Input([1]), layer]), optimizer=keras.optimizers.SGD(1.0))

    def train_step(state: State, batch: Any) -> Any:
        return minimize(lambda b: state.model(b["x"])[:, 0], batch, state.optimizer, state.model.trainable_variables)

    return Task(build, train_step, lambda: {"x": np.array([[3.0], [6.0], [3.0], [6.0]], np.float32)})


ROWS = {
    "SGD": Row(lambda: regression(linear)),
    "momentum": Row(lambda: regression(linear, lambda: keras.optimizers.SGD(0.05, momentum=0.9))),
    "Adam": Row(lambda: regression(linear, lambda: keras.optimizers.Adam(0.05))),
    "AdamW, weight decay": Row(lambda: regression(linear, lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1))),
    "sample weights": Row(lambda: regression(weights=True)),
    "masked tokens": Row(lambda: sequences(lambda: [keras.layers.Embedding(12, 8), dense(8)])),
    "weight penalties": Row(
        lambda: regression(lambda: mlp(kernel_regularizer=keras.regularizers.L2(0.1)), penalized=True)
    ),
    "weight penalties, uneven": Row(
        lambda: regression(lambda: mlp(kernel_regularizer=keras.regularizers.L2(0.1)), penalized=True, examples=37)
    ),
    "clip, global norm": Row(regression, dict(clip_global_norm=0.3)),
    "clip, each variable": Row(regression, dict(clip_norm=0.2)),
    "clip, value": Row(regression, dict(clip_value=0.05)),
    "clip norm 1 of 3 and 6": Row(threes_and_sixes, dict(clip_global_norm=1.0, global_batch_size=4)),
    "transform": Row(lambda: regression(transform=centralize)),
    "accumulation 1": Row(regression, dict(micro_batches=1)),
    "accumulation 2": Row(regression, dict(micro_batches=2)),
    "accumulation 4": Row(regression, dict(micro_batches=4)),
    "uneven last batch": Row(lambda: regression(examples=37)),
    "fewer examples than replicas": Row(lambda: regression(examples=3), dict(global_batch_size=4)),
    "BatchNorm, synchronized": Row(lambda: regression(batch_norm)),
    "embedding, sparse gradients": Row(lambda: sequences(lambda: [keras.layers.Embedding(12, 8)])),
    "LSTM": Row(
        lambda: sequences(lambda: [keras.layers.Embedding(12, 4), keras.layers.LSTM(4, return_sequences=True)])
    ),
    "dropout off": Row(lambda: regression(no_dropout)),
    "nested, subclassed, shared, frozen": Row(lambda: regression(Nested)),
    "EMA": Row(regression, dict(ema_momentum=0.9)),
    "learning-rate schedule": Row(lambda: regression(make_optimizer=schedule)),
    "sharded slots": Row(
        lambda: sequences(lambda: [keras.layers.Embedding(12, 8), dense(7)]),
        dict(shard_optimizer=True, clip_global_norm=0.5, micro_batches=2, ema_momentum=0.9),
    ),
    "sharded slots, GAN": Row(gan, dict(shard_optimizer=True)),
    "GAN, two optimizers": Row(gan),
    "one model, two optimizers": Row(two_optimizers),
    "mixed_bfloat16": Row(regression, dict(precision="mixed_bfloat16", gradient_norm=True), epsilon=2.0**-8),
    "mixed_float16": Row(regression, dict(precision="mixed_float16", gradient_norm=True), epsilon=2.0**-11),
    "a pack a gradient": Row(regression, dict(bytes_per_pack=1)),
    "bfloat16 wire": Row(regression, dict(wire_dtype="bfloat16", gradient_norm=True), epsilon=2.0**-8),
    "float16 wire": Row(regression, dict(wire_dtype="float16", gradient_norm=True), epsilon=2.0**-11),
    "jit_compile": Row(regression, dict(jit_compile=True)),
}


def run_config(name: str, column: dict[str, Any], workdir: str) -> RunConfig:
    """Return the settings of a row in a column; one step a call, so that each step's loss is logged."""
    settings = dict(train_steps=STEPS, global_batch_size=BATCH, steps_per_call=1, seed=3, workdir=workdir)
    return RunConfig(**{**settings, **ROWS[name].config, **column})
