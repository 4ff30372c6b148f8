"""What the transformers have in common: an embedding, and a block of self-attention and a multilayer perceptron."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops


def initial() -> Any:
    """Return the initial weights of BERT, which are all but those of GPT-2."""
    return keras.initializers.TruncatedNormal(stddev=0.02)


def dense(units: int, activation: Any = None, **settings: Any) -> keras.layers.Dense:
    """Return a dense layer with these initial weights."""
    return keras.layers.Dense(units, activation, kernel_initializer=initial(), **settings)


def norm() -> keras.layers.LayerNormalization:
    """Return a layer normalization of the last axis."""
    return keras.layers.LayerNormalization(epsilon=1e-6)


class Embedding(keras.layers.Layer):
    """Look up rows of a table `[size, width]`; with `reverse`, return the product of `[..., width]` with each row."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.table = self.add_weight(shape=[size, width], initializer=initial(), autocast=False, name="table")

    def call(self, x: tf.Tensor, reverse: bool = False) -> tf.Tensor:
        """Return `[..., width]` for indices `[...]`, or `[..., size]`."""
        if reverse:
            return tf.linalg.matmul(x, tf.cast(self.table, x.dtype), transpose_b=True)
        # A reshape makes the gradient dense: with a row for each index, it would be larger than the table.
        rows = tf.gather(tf.reshape(self.table, self.table.shape), x)
        return tf.cast(rows, self.compute_dtype)


class Positions(keras.layers.Layer):
    """Add a learned row for each position to `[batch, length, width]`, of which there may be `size`."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.table = self.add_weight(shape=[size, width], initializer=initial(), name="table")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return `[batch, length, width]`."""
        return x + self.table[: x.shape[1]]


def block(
    x: Any,
    heads: int,
    *,
    activation: Any,
    dropout: float,
    mask: Any = None,
    pre_norm: bool = True,
) -> Any:
    """Return one block's `[batch, length, width]`; positions attend where `mask`, broadcast to `[..., length, length]`.

    `pre_norm` normalizes what goes into attention and perceptron (GPT-2, ViT), else their sums with x (BERT).
    """
    for part in (lambda x: _attention(x, heads, mask, dropout), lambda x: _perceptron(x, activation)):
        if pre_norm:
            x = x + keras.layers.Dropout(dropout)(part(norm()(x)))
        else:
            x = norm()(x + keras.layers.Dropout(dropout)(part(x)))
    return x


def causal_mask(length: int) -> np.ndarray:
    """Return a mask `[length, length]` under which no position attends to a later one."""
    return np.tril(np.ones([length, length], bool))


def _attention(x: Any, heads: int, mask: Any, dropout: float) -> Any:
    _, length, width = x.shape
    all_heads = ops.reshape(dense(3 * width)(x), [-1, length, 3, heads, width // heads])
    parts: Any = ops.unstack(ops.transpose(all_heads, [2, 0, 3, 1, 4]), 3)
    query, key, value = parts
    scores = ops.matmul(query, ops.transpose(key, [0, 1, 3, 2])) / (width // heads) ** 0.5
    if mask is not None:
        scores = ops.where(mask, scores, -1e4)  # within the range of 16 bits
    shares = keras.layers.Dropout(dropout)(ops.softmax(scores))
    found = ops.transpose(ops.matmul(shares, value), [0, 2, 1, 3])
    return dense(width)(ops.reshape(found, [-1, length, width]))


def _perceptron(x: Any, activation: Any) -> Any:
    width = x.shape[-1]
    return dense(width)(dense(4 * width, activation)(x))
