"""The loss scale of mixed_float16: small gradients are scaled up so that they do not vanish in 16 bits.

Not to be confused with dividing the loss by the global batch, which `minimize` always does. The rules are those of
"Mixed Precision Training" (https://arxiv.org/abs/1710.03740): shrink on an overflow, grow after a long run without one.
"""

from dataclasses import dataclass
from typing import final

import tensorflow as tf


@dataclass(frozen=True)
class Scaling:
    """Say how a loss scale starts and moves; with factors of 1 it is static."""

    initial: float
    growth_steps: int  # steps in a row without overflow until it grows
    growth_factor: float
    backoff_factor: float
    floor: float


@final
class LossScale:
    """Hold the scale of one optimizer in variables, the same on every replica. Make it in the strategy's scope."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        # Updated by every replica for itself, from reduced gradients: all do the same.
        self.scale = tf.Variable(tf.constant(scaling.initial, tf.float32), trainable=False)
        # Steps in a row without overflow since the scale last changed; below 0, steps skipped in a row at the lowest.
        self.streak = tf.Variable(tf.constant(0, tf.int64), trainable=False)
        self.skipped = tf.Variable(tf.constant(0, tf.int64), trainable=False)

    @property
    def variables(self) -> dict[str, tf.Variable]:
        """Return what a checkpoint keeps, by name."""
        return {"scale": self.scale, "streak": self.streak, "skipped": self.skipped}

    def update(self, finite: tf.Tensor) -> None:
        """Take note of a step whose reduced gradients were `finite` (bool scalar) or not. Replica context."""
        scaling, streak = self.scaling, self.streak.read_value()
        lowest = (self.scale <= scaling.floor) | (scaling.backoff_factor == 1.0)
        skipped_in_a_row = tf.where(lowest, tf.minimum(streak, 0) - 1, 0)
        streak = tf.where(finite, tf.maximum(streak, 0) + 1, skipped_in_a_row)
        grows = streak >= scaling.growth_steps
        grown = tf.where(grows, self.scale * scaling.growth_factor, self.scale)
        grown = tf.where(tf.math.is_finite(grown), grown, self.scale)
        shrunk = tf.maximum(self.scale * scaling.backoff_factor, scaling.floor)
        self.scale.assign(tf.where(finite, grown, shrunk))
        self.streak.assign(tf.where(grows, tf.zeros_like(streak), streak))
        self.skipped.assign_add(tf.cast(tf.logical_not(finite), tf.int64))


def all_finite(gradients: list[tf.Tensor | tf.IndexedSlices]) -> tf.Tensor:
    """Return a bool scalar: whether no gradient holds an infinity or a NaN."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
