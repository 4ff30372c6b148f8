"""`minimize`: forward, backward, one cross-replica reduction, then every decision, then the update.

With per-example losses l, weights w and all replicas together, it applies the gradient of sum(l * w) / sum(w): the
same number however the global batch is split. Clipping, transforms and the finite test see the reduced gradient, so
that all replicas and workers decide alike.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from distloop import fused
from distloop.backward import Gradient, LocalResult, LossFn, local_result
from distloop.errors import UsageError
from distloop.metrics import Metric, divide, unpack
from distloop.precision import all_finite
from distloop.reduction import all_reduce_sum
from distloop.scopes import PureScope, current_step, suspended
from distloop.task import Batch
from distloop.updates import UpdateRule, check_optimizer, clip, has_rule, rule_of, update_averages

Transform = Callable[[list[tf.Tensor], list[keras.Variable]], Sequence[tf.Tensor]]


def minimize(
    loss_fn: LossFn,
    batch: Batch,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    *,
    penalty: Callable[[], Any] | None = None,
    transform: Transform | None = None,
    name: str | None = None,
) -> dict[str, Metric]:
    """Update `variables` by one step of `optimizer` on the global batch; return the loss and the metrics, reduced.

        minimize(lambda batch: model_losses(batch), batch, state.optimizer, state.model.trainable_variables)

    Call it in a train step (replica context), once for each optimizer. `loss_fn(batch)` returns per-example losses
    `[local_batch]`, or `mean(losses, weights)` with a denominator of its own (tokens), or a pair of either and a dict
    of metrics; it scales, averages and divides nothing.

    `penalty()` returns a scalar that counts once, such as `sum(model.losses)`; it is called after `loss_fn`.
    `transform(gradients, variables)` returns other gradients; it gets the reduced ones, clipped and dense, float32, and
    must give the same on every replica (no `tf.random` but the stateless kind, with a seed made of `state.step`).
    `name` begins the metrics' names (`name_loss`) in a step that minimizes twice; of two calls with one name, those of
    the last remain. What layers write in `loss_fn` (statistics, seeds) is agreed on by the replicas: the mean over
    those whose weights add up to more than 0. A `tf.Variable` that `loss_fn` writes is not, nor restored by a skip.
    Raises UsageError on a loss that is already reduced, on variables that are not Keras's, and if none has a gradient.
    """
    _check_call(batch, optimizer, variables, name)
    rule = rule_of(optimizer)
    scale = None if rule.loss_scale is None else rule.loss_scale.scale.read_value()
    factor = _factor(scale, batch, rule)
    local = local_result(
        loss_fn,
        batch,
        variables,
        penalty=penalty,
        factor=factor,
        micro_batches=rule.micro_batches,
        jit_compile=rule.jit_compile,
    )
    gradients, sums, values = _reduce(local, factor, rule)
    wants_norm = rule.gradient_norm or rule.clip_global_norm is not None
    norm = tf.linalg.global_norm([tf.convert_to_tensor(g) for g in gradients]) if wants_norm else None

    def commit(gradients: list[Gradient], values: list[tf.Tensor]) -> None:
        with suspended():
            for variable, value in zip(local.written, values, strict=True):
                variable.assign(value)  # before the update: a layer may have rewritten a weight in its forward pass
            _apply(optimizer, _clipped_and_transformed(gradients, local.variables, rule, transform), local.variables)
            update_averages(local.variables, rule)

    finite = None
    if rule.loss_scale is None:
        commit(gradients, values)
    else:
        finite = all_finite(gradients)
        _run_if(finite, commit, gradients, values)
        rule.loss_scale.update(finite)
        sums = tf.where(finite, sums, 0.0)  # a skipped step counts nowhere
    metrics = unpack(sums, local.metrics) | _own_metrics(norm, scale, finite)
    return {key if name is None else f"{name}_{key}": metric for key, metric in metrics.items()}


def _check_call(batch: Batch, optimizer: object, variables: Sequence[object], name: str | None) -> None:
    if not isinstance(batch, dict) or "weight" not in batch:
        raise UsageError(
            f"minimize got {type(batch).__name__} as its batch; expected the dict of the step with its 'weight', 0 for "
            "padding: {**batch, ...} keeps it."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(f"minimize got a {type(optimizer).__name__} as its optimizer; expected state.optimizer.")
    check_optimizer(optimizer)
    if isinstance(variables, keras.Layer) or not all(isinstance(variable, keras.Variable) for variable in variables):
        raise UsageError(
            "minimize got variables that are not Keras variables; expected model.trainable_variables or a list of "
            "keras.Variable (Keras optimizers do not update a tf.Variable)."
        )
    if len({id(variable) for variable in variables}) != len(variables):
        raise UsageError("minimize got a variable twice and would update it twice; give each once.")
    step = current_step()
    if name is None and step is not None:
        if step.has_unnamed_minimize:
            raise UsageError('the step calls minimize twice without names: give each a name="...", for its metrics.')
        step.has_unnamed_minimize = True
    if step is not None and not has_rule(optimizer):
        raise UsageError(
            "minimize got an optimizer that is not in the State, so that neither flags nor checkpoints reach it; "
            "give it to State(...) in the task's build function."
        )


def _factor(scale: tf.Tensor | None, batch: Batch, rule: UpdateRule) -> tf.Tensor | None:
    """Return what the summed loss is multiplied by, so that 16 bits hold its gradient: near the mean over examples."""
    examples = float(batch["weight"].shape[0] or 1)
    if rule.wire_dtype != "float32":  # the sum over the replicas has 16 bits, too
        examples *= tf.distribute.get_strategy().num_replicas_in_sync
        scale = tf.constant(1.0) if scale is None else scale
    return None if scale is None else scale / examples


def _reduce(
    local: LocalResult, factor: tf.Tensor | None, rule: UpdateRule
) -> tuple[list[Gradient], tf.Tensor, list[tf.Tensor]]:
    """Sum gradients and metric sums over all replicas and average what layers wrote, in the one reduction of a step.

    The gradients are divided by the global count, and by the loss scale that is in `factor`. What layers wrote becomes
    its mean over the replicas that hold examples; integers stay: seeds differ from replica to replica on purpose. The
    first reduction of a step also carries the step's riders. Only gradients may travel in 16 bits.
    """
    present = tf.cast(local.sums[1] > 0, tf.float32)  # the loss comes first in the sums: total, count
    floating = [i for i, value in enumerate(local.values) if value.dtype.is_floating]
    statistics = [tf.where(present > 0, tf.cast(local.values[i], tf.float32), 0.0) for i in floating]
    step = current_step()
    riders = tf.zeros([0])
    if step is not None and step.reduced_riders is None:
        riders = step.riders
        step.mark_part(tf.nest.flatten(local.gradients, expand_composites=True))
    carried = tf.concat([local.sums, riders], axis=0)
    dtypes = [g.dtype for g in local.gradients]
    in_16_bits = rule.wire_dtype != "float32" and tf.distribute.get_strategy().num_replicas_in_sync > 1
    sent = [_cast(g, rule.wire_dtype) for g in local.gradients] if in_16_bits else local.gradients
    gradients, carried, statistics, holders = all_reduce_sum(
        (sent, carried, statistics, present), bytes_per_pack=rule.bytes_per_pack
    )
    gradients = [_cast(*pair) for pair in zip(gradients, dtypes, strict=True)]
    sums = carried[: local.sums.shape[0]]
    if step is not None and step.reduced_riders is None:
        step.reduced_riders = carried[local.sums.shape[0] :]
    inverse = tf.math.divide_no_nan(1.0, sums[1] if factor is None else sums[1] * factor)
    values = list(local.values)
    for i, total in zip(floating, statistics, strict=True):
        variable = local.written[i]
        average = tf.where(holders > 0, total / tf.maximum(holders, 1.0), tf.cast(variable.value, tf.float32))
        values[i] = tf.cast(average, values[i].dtype)
    return [_multiply(_sum_repeated_rows(g), inverse) for g in gradients], sums, values


def _clipped_and_transformed(
    gradients: list[Gradient], variables: list[keras.Variable], rule: UpdateRule, transform: Transform | None
) -> Sequence[Gradient]:
    if transform is None and (rule.clip_global_norm, rule.clip_norm, rule.clip_value) == (None, None, None):
        return gradients
    # The rows of a sparse gradient are a part of their variable: norms and transforms see the whole.
    dense = clip([tf.convert_to_tensor(g) for g in gradients], rule)
    if transform is None:
        return dense
    with PureScope([]) as scope:
        transformed = transform(dense, variables)
    if scope.written:
        (first, *_) = scope.written.values()
        raise UsageError(
            f"transform writes {first.path!r}, perhaps another on each replica; it must give the same on all: draw "
            "noise by tf.random.stateless_normal with a seed made of state.step, and keep state in tf.Variable."
        )
    shapes = [g.shape for g in dense]
    found = [tf.convert_to_tensor(g) for g in transformed] if isinstance(transformed, list | tuple) else []
    if [g.shape for g in found] != shapes:
        raise UsageError(
            f"transform returned {len(found)} gradients of shapes {[g.shape.as_list() for g in found]}; "
            f"expected a list with one for each of the {len(shapes)} variables, of its shape."
        )
    return found


def _run_if(finite: tf.Tensor, commit: Callable[..., None], *arguments: Any) -> None:
    """Run `commit(*arguments)` on each replica if `finite`, the same on all; else leave every variable as it is.

    A branch may not meet other replicas from within; so the branch is taken once, outside, for all local replicas.
    """

    def decide(strategy: tf.distribute.Strategy, finite: Any, *arguments: Any) -> None:
        def run() -> tf.Tensor:
            strategy.run(commit, args=arguments)
            return tf.constant(0)

        tf.cond(strategy.experimental_local_results(finite)[0], run, lambda: tf.constant(0))

    tf.distribute.get_replica_context().merge_call(decide, args=(finite, *arguments))


def _apply(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Gradient], variables: Sequence[keras.Variable]
) -> None:
    # Keras would sum over replicas again; this hook is where it does (TFOptimizer, Keras 3.15; a test pins it). What
    # it returns, Keras updates.
    optimizer._all_reduce_sum_gradients = lambda pairs: [pair for pair in pairs if not fused.update(optimizer, *pair)]
    try:
        optimizer.apply(gradients, variables)
    except ValueError as error:
        if "originally built with" not in str(error):
            raise
        (stranger,) = re.findall(r"path=([^,>]+)", str(error))[:1] or ["one of them"]
        raise UsageError(
            f"the optimizer was built for other variables than {stranger!r}, which minimize got; give minimize the "
            "variables of this optimizer, or build it for them in the task's build function."
        ) from error


def _own_metrics(norm: tf.Tensor | None, scale: Any, finite: tf.Tensor | None) -> dict[str, Metric]:
    """Return what minimize says of its step: the same on all replicas, means over steps, those not skipped."""
    counted = tf.constant(1.0) if finite is None else tf.cast(finite, tf.float32)
    own = {}
    if norm is not None:
        own["gradient_norm"] = Metric((tf.where(counted > 0, norm, 0.0), counted), divide, reduced=True)
    if scale is not None:
        own["loss_scale"] = Metric((scale, tf.constant(1.0)), divide, reduced=True)
        own["skipped_steps"] = Metric((1.0 - counted,), float, reduced=True)
    return own


def _sum_repeated_rows(gradient: Gradient) -> Gradient:
    """Add up the rows of a sparse gradient that have the same index; Keras's Adam would count each for itself."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.shape(indices)[0])
    return tf.IndexedSlices(values, indices, gradient.dense_shape)


def _cast(gradient: Gradient, dtype: tf.DType | str) -> Gradient:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)


def _multiply(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):  # the gradient of an embedding stays sparse
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor
