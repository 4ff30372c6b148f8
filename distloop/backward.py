"""Forward and backward on one replica as a pure function, which reads variables and writes none.

So it can be compiled, run in micro-batches, and thrown away when the step is skipped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from distloop.errors import UsageError
from distloop.metrics import Metric, check, divide, mean, pack
from distloop.scopes import PureScope
from distloop.task import Batch

# Any: Keras types its losses as a tensor of whichever backend.
LossFn = Callable[[Batch], Any | tuple[Any, Mapping[str, Metric]]]
Gradient = tf.Tensor | tf.IndexedSlices


@dataclass(frozen=True)
class LocalResult:
    """Hold what one replica found: gradients of the summed loss, packed metric sums, and what the layers wrote."""

    gradients: list[Gradient]
    variables: list[keras.Variable]  # those that have a gradient, in the order of `gradients`
    sums: tf.Tensor  # float32 vector, packed as `metrics`
    metrics: dict[str, Metric]  # of this function's graph: for names, shapes and `compute` only
    written: list[keras.Variable]  # statistics and seeds
    values: list[tf.Tensor]  # their new values


def local_result(
    loss_fn: LossFn,
    batch: Batch,
    variables: Sequence[keras.Variable],
    *,
    penalty: Callable[[], Any] | None,
    factor: tf.Tensor | None,
    micro_batches: int,
    jit_compile: bool,
) -> LocalResult:
    """Return this replica's part: the gradient of `sum(loss * weight) * factor`, in `micro_batches` one after another.

    Replica context; nothing is exchanged with other replicas, except by layers that do so themselves.
    """
    trace: list[LocalResult] = []

    def run(batch: Batch, factor: tf.Tensor | None) -> tuple[list[Gradient], tf.Tensor, list[tf.Tensor]]:
        first, *rest = _split(batch, micro_batches)
        total = _one_micro_batch(loss_fn, first, variables, penalty, factor, [])
        for part in rest:
            # One after another, or all micro-batches would be in memory together.
            with tf.control_dependencies([total.sums, *_tensors(total.gradients)]):
                part = {name: tf.identity(value) for name, value in part.items()}
            carried = list(zip(total.written, total.values, strict=True))
            total = _add(total, _one_micro_batch(loss_fn, part, variables, penalty, factor, carried))
        trace.append(total)
        return total.gradients, total.sums, total.values

    if jit_compile:
        # Made anew for each replica: a cached trace would read the first replica's variables on all.
        run = tf.function(run, jit_compile=True, autograph=False)
    try:
        gradients, sums, values = run(batch, factor)
    except RuntimeError as error:
        if not jit_compile or "merge_call" not in str(error):
            raise
        raise UsageError(
            "jit_compile is on, but the loss function exchanges values between replicas (as "
            "BatchNormalization(synchronized=True) does), which XLA cannot compile here; drop --jit_compile."
        ) from error
    (found,) = trace
    return LocalResult(gradients, found.variables, sums, found.metrics, found.written, values)


def _one_micro_batch(
    loss_fn: LossFn,
    batch: Batch,
    variables: Sequence[keras.Variable],
    penalty: Callable[[], Any] | None,
    factor: tf.Tensor | None,
    carried: list[tuple[keras.Variable, tf.Tensor]],
) -> LocalResult:
    with tf.GradientTape() as tape, PureScope(carried) as scope:
        result = loss_fn(batch)
        losses, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        total, count = _as_mean(losses, batch["weight"]).parts
        if penalty is not None:
            # Weighted like the examples, the penalty counts once after the division by the global count.
            total += _checked_penalty(penalty(), scope) * count
        target = total if factor is None else total * factor
    extra = check(extra) if extra or not isinstance(extra, dict) else {}
    if "loss" in extra:
        raise UsageError("loss_fn returned a metric named 'loss'; that name is minimize's own: give yours another.")
    metrics = {"loss": Metric((total, count), divide), **extra}
    for name, metric in metrics.items():
        if metric.gathered:
            raise UsageError(f"loss_fn returned {name!r} made by gather; gather belongs in the eval step.")
    gradients = tape.gradient(target, [variable.value for variable in variables])
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    if not pairs:
        raise UsageError("the loss depends on none of the variables given to minimize; compute it from their model.")
    written = list(scope.written.values())
    before: dict[int, Any] = {id(variable): value for variable, value in carried}
    values = []
    for variable in written:
        value = scope.state_mapping[id(variable)]
        if value.dtype.is_floating:  # nothing but padding says nothing about the data
            value = tf.where(count > 0, value, tf.cast(before.get(id(variable), variable.value), value.dtype))
        values.append(value)
    return LocalResult(
        [g for g, _ in pairs],
        [v for _, v in pairs],
        pack(metrics),
        metrics,
        written,
        values,
    )


def _split(batch: Batch, parts: int) -> list[Batch]:
    size, rest = divmod(batch["weight"].shape[0] or 0, parts)
    if rest:
        raise UsageError(f"minimize got {size * parts + rest} examples for {parts} micro-batches; expected a multiple.")
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(parts)]


def _add(one: LocalResult, other: LocalResult) -> LocalResult:
    gradients = [_add_gradients(*pair) for pair in zip(one.gradients, other.gradients, strict=True)]
    return LocalResult(gradients, other.variables, one.sums + other.sums, other.metrics, other.written, other.values)


def _add_gradients(one: Gradient, other: Gradient) -> Gradient:
    if isinstance(one, tf.IndexedSlices) and isinstance(other, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([one.values, other.values], 0), tf.concat([one.indices, other.indices], 0), one.dense_shape
        )
    return tf.convert_to_tensor(one) + tf.convert_to_tensor(other)


def _tensors(gradients: Sequence[Gradient]) -> list[tf.Tensor]:
    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]


def _checked_penalty(penalty: Any, scope: PureScope) -> tf.Tensor:
    if scope.losses:
        # Keras averages these over the examples of a replica, padding included: no number of one device.
        raise UsageError(
            "a penalty is asked for, but layers add losses that depend on the examples (activity_regularizer, "
            "add_loss); add those to the losses of loss_fn, one an example, and keep weight penalties in penalty."
        )
    penalty = tf.cast(tf.convert_to_tensor(penalty), tf.float32)
    if penalty.shape.rank != 0:
        raise UsageError(f"penalty returned a tensor of shape {penalty.shape}; expected a scalar: sum(model.losses).")
    return penalty


def _as_mean(losses: object, weight: tf.Tensor) -> Metric:
    """Return the loss as a sum and a count: the loss function's own, or per-example losses with the batch's weights."""
    if isinstance(losses, Metric):
        if losses.compute is not divide or losses.reduced:
            raise UsageError(
                "loss_fn returned a metric that is no local mean as its loss; "
                "expected mean(token_losses, token_weights)."
            )
        return losses
    shape = losses.shape if isinstance(losses, tf.Tensor) else None
    if shape is None or shape.rank != 1 or not shape.is_compatible_with(weight.shape):
        what = type(losses).__name__ if shape is None else f"a loss of shape {shape}"
        if shape is not None and shape.rank == 2 and shape[1] == 1:
            raise UsageError(f"loss_fn returned {what}; expected shape {weight.shape}: drop the last axis with [:, 0].")
        raise UsageError(
            f"loss_fn returned {what}; expected one loss an example, shape {weight.shape}, because distloop itself "
            "divides by the global batch: use keras.losses.mean_squared_error(y, p), not "
            "keras.losses.MeanSquaredError()(y, p) and not tf.reduce_mean. For one loss a token: mean(losses, weights)."
        )
    return mean(losses, weight)
