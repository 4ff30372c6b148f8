"""A recommendation model, DLRM (https://arxiv.org/abs/1906.00091): lookups in large tables, small dense layers.

    python -m launch.train --task=dlrm_small --workdir=runs/dlrm --global_batch_size=2048 --learning_rate=0.1

The tables have the sizes of the Criteo Kaggle data set, cut to a million rows each; clicks are made up. The gradient of
the tables stays sparse: rows that are looked up, not the tables, are exchanged between replicas.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from distloop import Metric, RunConfig, State, Task, UsageError, minimize

Batch = dict[str, tf.Tensor]
# What --arch-embedding-size is in facebookresearch/dlrm, bench/dlrm_s_criteo_kaggle.sh
_KAGGLE = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_NUMBERS = 13  # features of an example that are numbers


def make_task(
    config: RunConfig, *, rows: int = 1_000_000, width: int = 64, dense: int = 512, examples: int = 65536
) -> Task:
    """Predict clicks by SGD, from 26 tables of at most `rows` rows of `width` and layers of up to `dense` units."""
    if config.data_dir is not None:
        raise UsageError(f"data_dir is {config.data_dir}, but dlrm_small has made-up clicks only; drop it.")
    sizes = np.minimum(_KAGGLE, rows)

    def perceptron(x: Any, *units: int) -> Any:
        for number in units:
            x = keras.layers.Dense(number, activation="relu")(x)
        return x

    def build() -> State:
        numbers = keras.Input([_NUMBERS])
        categories = keras.Input([len(sizes)], dtype="int32")
        # One table holds all, one below the other: one lookup, one gradient.
        table = keras.layers.Embedding(int(sizes.sum()), width)
        vectors = table(categories + (np.cumsum(sizes) - sizes).astype(np.int32))
        bottom = perceptron(numbers, dense, dense // 2, width)
        vectors = ops.concatenate([bottom[:, None], vectors], axis=1)
        products = ops.matmul(vectors, ops.transpose(vectors, [0, 2, 1]))
        count = 1 + len(sizes)
        lower = np.flatnonzero(np.tri(count, k=-1))
        pairs = ops.take(ops.reshape(products, [-1, count * count]), lower, axis=1)
        top = perceptron(ops.concatenate([bottom, pairs], axis=1), dense, dense // 2)
        click = keras.layers.Dense(1, dtype="float32")(top)
        model = keras.Model([numbers, categories], click)
        return State(model=model, optimizer=keras.optimizers.SGD(config.learning_rate))

    def train_step(state: State, batch: Batch) -> dict[str, Metric]:
        def loss(batch: Batch) -> Any:
            logits = state.model([batch["numbers"], batch["categories"]], training=True)
            return keras.losses.binary_crossentropy(batch["click"][:, None], logits, from_logits=True)

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def train_data() -> dict[str, np.ndarray]:
        draw = np.random.default_rng(config.seed)
        return {
            "numbers": draw.normal(size=[examples, _NUMBERS]).astype(np.float32),
            "categories": draw.integers(sizes, size=[examples, len(sizes)], dtype=np.int32),
            "click": draw.integers(2, size=examples).astype(np.float32),
        }

    return Task(build, train_step, train_data)
