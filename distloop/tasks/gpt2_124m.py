"""The small GPT-2 (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).

    python -m launch.train --task=gpt2_124m --dataset=tiny_shakespeare --data_dir=DIR --workdir=runs/gpt2

Tokens are the bytes of the text; without --data_dir they are made up.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distloop import Metric, RunConfig, State, Task, UsageError, in_memory, load_tfds, minimize
from distloop.tasks._transformer import Embedding, Positions, block, causal_mask, norm

Batch = dict[str, tf.Tensor]


def decoder(*, layers: int, width: int, heads: int, vocabulary: int, length: int, dropout: float) -> keras.Model:
    """Return the model from tokens `[batch, length]` to logits `[batch, length, vocabulary]` of those that follow."""
    tokens = keras.Input([length], dtype="int32")
    embedding = Embedding(vocabulary, width)
    x = keras.layers.Dropout(dropout)(Positions(length, width)(embedding(tokens)))
    mask = causal_mask(length)
    for _ in range(layers):
        x = block(x, heads, mask=mask, dropout=dropout, activation=_gelu)
    return keras.Model(tokens, embedding(norm()(x), reverse=True))


def make_task(
    config: RunConfig,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50257,
    length: int = 1024,
    dropout: float = 0.1,
    examples: int = 4096,
) -> Task:
    """Predict the next token with AdamW: the texts of `config.dataset`, or `examples` made-up sequences."""

    def build() -> State:
        model = decoder(layers=layers, width=width, heads=heads, vocabulary=vocabulary, length=length, dropout=dropout)
        optimizer = keras.optimizers.AdamW(config.learning_rate, beta_2=0.95, epsilon=1e-8, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        return State(model=model, optimizer=optimizer)

    def train_step(state: State, batch: Batch) -> dict[str, Metric]:
        def loss(batch: Batch) -> Any:
            tokens = tf.cast(batch["tokens"], tf.int32)
            logits = tf.cast(state.model(tokens[:, :-1], training=True), tf.float32)
            # Each example has as many tokens: the mean of their means is that over all tokens.
            losses: Any = keras.losses.sparse_categorical_crossentropy(tokens[:, 1:], logits, from_logits=True)
            return tf.reduce_mean(losses, axis=1)

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def train_data() -> dict[str, np.ndarray]:
        if config.data_dir is None:
            tokens = np.random.default_rng(config.seed).integers(
                vocabulary, size=[examples, length + 1], dtype=np.int32
            )
        else:
            tokens = _bytes_of(config)
            tokens = tokens[: len(tokens) // (length + 1) * (length + 1)].reshape([-1, length + 1])
        return {"tokens": tokens}

    return Task(build, train_step, train_data)


def _bytes_of(config: RunConfig) -> np.ndarray:
    features = in_memory(load_tfds(config.dataset, "train", config.data_dir))
    if "text" not in features:
        raise UsageError(
            f"data set {config.dataset!r} has the features {', '.join(features)}; expected one with a text, such as "
            "--dataset=tiny_shakespeare."
        )
    return np.frombuffer(b"".join(features["text"]), np.uint8)


def _gelu(x: Any) -> Any:
    return keras.activations.gelu(x, approximate=True)
