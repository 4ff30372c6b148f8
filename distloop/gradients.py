"""`minimize`: forward, backward, one cross-replica reduction, update. The only all-reduce of gradients.

With per-example losses l, weights w and all replicas together, it applies the gradient of sum(l * w) / sum(w): the
same number however the global batch is split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from distloop.config import UsageError
from distloop.metrics import Mean, all_reduce_sum, check, mean, pack, unpack
from distloop.task import Batch

# Any: Keras types its losses as a tensor of whichever backend.
LossFn = Callable[[Batch], Any | tuple[Any, Mapping[str, Mean]]]


def minimize(
    loss_fn: LossFn, batch: Batch, optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> dict[str, Mean]:
    """Update `variables` by one step of `optimizer` on the global batch; return the loss and the metrics, reduced.

        minimize(lambda batch: model_losses(batch), batch, state.optimizer, state.model.trainable_variables)

    Call it in a train step (replica context), once for each optimizer. `loss_fn(batch)` returns per-example losses
    `[local_batch]`, or those and a dict of metrics; what it returns is not scaled, averaged or divided by replicas.
    Raises UsageError on a loss that is already reduced, on variables that are not Keras's, and if none has a gradient.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It decides on local gradients and hides an optimizer that reduces again (keras#18666).
        raise UsageError(
            "minimize got a Keras LossScaleOptimizer, which is wrong on several replicas; pass its inner one."
        )
    if not all(isinstance(variable, keras.Variable) for variable in variables):
        raise UsageError(
            "minimize got variables that are not Keras variables; Keras optimizers update the weights of layers and "
            "keras.Variable, not tf.Variable."
        )
    with tf.GradientTape() as tape:
        result = loss_fn(batch)
        losses, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        _check_per_example(losses, batch["weight"])
        loss = mean(losses, batch["weight"])
    if "loss" in extra:
        raise UsageError("loss_fn returned a metric named 'loss'; that name is minimize's own: give yours another.")
    metrics = {"loss": loss, **(check(extra) if extra else {})}
    gradients = tape.gradient(loss.total, [variable.value for variable in variables])
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    if not pairs:
        raise UsageError("the loss depends on none of the variables given to minimize; compute it from their model.")

    # The one reduction: metrics and the denominator ride on the gradients' pack.
    reduced, sums = all_reduce_sum(([g for g, _ in pairs], pack(list(metrics.values()))))
    metrics = dict(zip(metrics, unpack(sums), strict=True))
    scale = tf.math.divide_no_nan(1.0, metrics["loss"].count)
    # Keras would sum over replicas again; this hook is where it does (TFOptimizer, Keras 3.15; a test pins it).
    optimizer._all_reduce_sum_gradients = _leave_as_they_are
    optimizer.apply([_multiply(g, scale) for g in reduced], [v for _, v in pairs])
    return metrics


def _leave_as_they_are(gradients_and_variables: Any) -> Any:
    return gradients_and_variables


def _multiply(gradient: tf.Tensor | tf.IndexedSlices, factor: tf.Tensor) -> tf.Tensor | tf.IndexedSlices:
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):  # the gradient of an embedding stays sparse
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def _check_per_example(losses: object, weight: tf.Tensor) -> None:
    shape = losses.shape if isinstance(losses, tf.Tensor) else None
    if shape is None or shape.rank != 1 or not shape.is_compatible_with(weight.shape):
        what = type(losses).__name__ if shape is None else f"a loss of shape {shape}"
        if shape is not None and shape.rank == 2 and shape[1] == 1:
            raise UsageError(f"loss_fn returned {what}; expected shape {weight.shape}: drop the last axis with [:, 0].")
        raise UsageError(
            f"loss_fn returned {what}; expected one loss an example, shape {weight.shape}, because distloop itself "
            "divides by the global batch: use keras.losses.mean_squared_error(y, p), not "
            "keras.losses.MeanSquaredError()(y, p) and not tf.reduce_mean."
        )
