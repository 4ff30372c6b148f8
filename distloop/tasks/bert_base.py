"""BERT (https://arxiv.org/abs/1810.04805) in phase 1 of its pretraining: masked tokens and next sentences, AdamW.

    python -m launch.train --task=bert_base --data_dir=DIR --workdir=runs/bert --clip_global_norm=1

DIR holds TFRecord files as `create_pretraining_data.py` of google-research/bert writes them, of this length and this
number of predictions; without it, examples are made up.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from distloop import Metric, Pipeline, RunConfig, State, Task, load_tfrecords, mean, minimize
from distloop.tasks._transformer import Embedding, Positions, block, dense, norm

Batch = dict[str, tf.Tensor]
_POSITIONS = 512


class MaskedTokens(keras.layers.Layer):
    """Return logits `[batch, predictions, vocabulary]` at some positions, by the table of the `embedding`."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        size, width = embedding.table.shape
        self.transform, self.norm = dense(width, "gelu"), norm()
        self.bias = self.add_weight(shape=[size], initializer="zeros", name="bias")

    def call(self, x: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Return the logits for `[batch, length, width]` at the positions `[batch, predictions]`."""
        x = self.norm(self.transform(tf.gather(x, positions, batch_dims=1)))
        return self.embedding(x, reverse=True) + self.bias


def encoder(
    *, layers: int, width: int, heads: int, vocabulary: int, length: int, predictions: int, dropout: float
) -> keras.Model:
    """Return the model from the features of an example to logits of masked tokens and of the next sentence."""
    tokens, mask, segments = [keras.Input([length], dtype="int32", name=name) for name in _TOKENS]
    positions = keras.Input([predictions], dtype="int32", name="masked_lm_positions")
    embedding = Embedding(vocabulary, width)
    x: Any = Positions(_POSITIONS, width)(embedding(tokens) + Embedding(2, width)(segments))
    x = keras.layers.Dropout(dropout)(norm()(x))
    attended = ops.reshape(ops.cast(mask, "bool"), [-1, 1, 1, length])
    for _ in range(layers):
        x = block(x, heads, mask=attended, dropout=dropout, activation="gelu", pre_norm=False)
    following = dense(2)(dense(width, "tanh")(x[:, 0]))
    return keras.Model([tokens, mask, segments, positions], [MaskedTokens(embedding)(x, positions), following])


_TOKENS = ("input_ids", "input_mask", "segment_ids")
_INPUTS = (*_TOKENS, "masked_lm_positions")


def make_task(
    config: RunConfig,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 30522,
    length: int = 128,
    predictions: int = 20,
    dropout: float = 0.1,
    examples: int = 16384,
) -> Task:
    """Pretrain on the records in `config.data_dir`, or on `examples` made-up ones; lengths are in tokens."""

    def build() -> State:
        model = encoder(
            layers=layers,
            width=width,
            heads=heads,
            vocabulary=vocabulary,
            length=length,
            predictions=predictions,
            dropout=dropout,
        )
        optimizer = keras.optimizers.AdamW(config.learning_rate, epsilon=1e-6, weight_decay=0.01)
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        return State(model=model, optimizer=optimizer)

    def train_step(state: State, batch: Batch) -> dict[str, Metric]:
        def loss(batch: Batch) -> tuple[Any, dict[str, Metric]]:
            tokens, following = state.model([batch[name] for name in _INPUTS], training=True)
            found = _crossentropy(batch["masked_lm_ids"], tokens)
            counted = batch["masked_lm_weights"]
            # Each example counts the same, however many of its tokens are masked.
            masked = tf.reduce_sum(found * counted, axis=1) / tf.maximum(tf.reduce_sum(counted, axis=1), 1.0)
            following = _crossentropy(batch["next_sentence_labels"][:, 0], following)
            return masked + following, {"next_sentence_loss": mean(following, batch["weight"])}

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def train_data() -> Any:
        made_up = _made_up(config.seed, examples, vocabulary, length, predictions)
        if config.data_dir is None:
            return made_up
        spec = {
            name: tf.io.FixedLenFeature(rows.shape[1:], tf.float32 if name == "masked_lm_weights" else tf.int64)
            for name, rows in made_up.items()
        }
        records = load_tfrecords(f"{config.data_dir}/*tfrecord*")
        return Pipeline(records, map=lambda record: tf.io.parse_single_example(record, spec))

    return Task(build, train_step, train_data)


def _crossentropy(labels: tf.Tensor, logits: tf.Tensor) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, tf.cast(logits, tf.float32), from_logits=True)


def _made_up(seed: int, examples: int, vocabulary: int, length: int, predictions: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)

    def integers(end: int, *shape: int) -> np.ndarray:
        return draw.integers(end, size=[examples, *shape], dtype=np.int32)

    return {
        "input_ids": integers(vocabulary, length),
        "input_mask": np.ones([examples, length], np.int32),
        "segment_ids": np.sort(integers(2, length)),
        "masked_lm_positions": integers(length, predictions),
        "masked_lm_ids": integers(vocabulary, predictions),
        "masked_lm_weights": np.ones([examples, predictions], np.float32),
        "next_sentence_labels": integers(2, 1),
    }
