"""`keras_metric`: any Keras metric whose state is a sum over examples; any other is refused with the reason.

auc = keras.metrics.AUC()      # outside of the step: in build
keras_metric(auc, batch["label"], scores, batch["weight"])      # in the step
"""

import functools
import inspect
import re
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from distloop.errors import UsageError
from distloop.metrics import Metric


class _Fit(NamedTuple):
    """Say how a metric takes its weights."""

    axes: int = 0  # the weights are spread over so many axes of y_true; 0: they are not
    whole: bool = False  # it counts in integers and cuts off fractions


# What was found out about each metric, by the shapes and dtypes of its inputs.
_fits: weakref.WeakKeyDictionary[Any, dict[Any, _Fit]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def keras_metric(metric: keras.metrics.Metric, y_true: Any, y_pred: Any, weight: Any) -> Metric:
    """Return what this replica's examples add to the state of `metric`; the host calls its `result` on the sums.

    `y_true` and `y_pred` are what its `update_state` takes, `[local_batch, ...]`; `weight`, float `[local_batch]` (or
    one a token), becomes its `sample_weight`, 0 for padding. Replica context, in an eval step or the loss function of a
    train step; no communication. The variables of `metric` are neither read nor written, but making them starts
    TensorFlow: make it once, in `build` (or in the `make_task` of a task that is given by its name). Sums are float32
    in a step and float64 over steps.

    Raises UsageError if made-up examples of these shapes show that the state is no sum over examples, or that examples
    of weight 0 count; on the host, if a metric that counts in integers meets fractional weights.
    """
    if not isinstance(metric, keras.metrics.Metric):
        raise UsageError(f"keras_metric got a {type(metric).__name__}; expected a metric such as keras.metrics.AUC().")
    y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
    weight = tf.cast(weight, tf.float32)
    for name, value in (("weight", weight), ("y_true", y_true), ("y_pred", y_pred)):
        if not value.shape.rank or not value.shape.is_fully_defined() or value.shape[0] != weight.shape[0]:
            raise UsageError(
                f"keras_metric got {name} of shape {value.shape} and a weight of shape {weight.shape} for "
                f"{metric.name!r}; expected one entry an example in each, in a shape that is known (tf.ensure_shape)."
            )
    fit = _fit(metric, y_true, y_pred, weight)
    zeros = [tf.zeros(variable.shape, variable.dtype) for variable in metric.variables]
    taken = _as_taken(weight, y_true, fit)
    parts = [tf.convert_to_tensor(p) for p in metric.stateless_update_state(zeros, y_true, y_pred, sample_weight=taken)]
    if fit.whole:
        parts.append(tf.math.count_nonzero(weight != tf.floor(weight), dtype=tf.float32))
    return Metric(tuple(parts), functools.partial(_compute, metric, fit.whole))


def _as_taken(weight: tf.Tensor, y_true: tf.Tensor, fit: _Fit) -> tf.Tensor:
    """Return the weights in the shape and dtype that the metric takes."""
    if fit.axes:
        weight = tf.reshape(weight, [*weight.shape, *[1] * (fit.axes - len(weight.shape))])
        weight = tf.broadcast_to(weight, y_true.shape[: fit.axes])
    return tf.cast(weight, tf.int32) if fit.whole else weight


def _compute(metric: keras.metrics.Metric, whole: bool, *sums: np.ndarray) -> Any:
    """Return the metric's result for a state that is `sums`, in NumPy. Eager, on one worker, no communication."""
    if whole and sums[-1]:
        raise UsageError(
            f"the metric {metric.name!r} counts in integers and would cut off the fractional weights of "
            f"{sums[-1]:.0f} examples; make it with dtype='float32'."
        )
    state = []
    for variable, total in zip(metric.variables, sums[: len(metric.variables)], strict=True):
        dtype = tf.as_dtype(variable.dtype)
        if dtype.is_integer and np.abs(total).max(initial=0) > dtype.max:
            raise UsageError(
                f"the metric {metric.name!r} counts in {dtype.name}, which does not hold {np.abs(total).max():.0f}; "
                "make it with dtype='float32'."
            )
        state.append(total.astype(dtype.as_numpy_dtype))
    return _result(metric, state)


def _result(metric: Any, state: list[np.ndarray]) -> Any:
    # Converted within the scope: a result may be a variable itself, which has another value outside of it.
    with keras.StatelessScope(zip(metric.variables, state, strict=True)):
        return keras.tree.map_structure(
            lambda leaf: np.asarray(leaf.value if isinstance(leaf, keras.Variable) else leaf), metric.result()
        )


def _fit(metric: keras.metrics.Metric, *inputs: tf.Tensor) -> _Fit:
    """Return how the metric takes inputs of these shapes; find out the first time. Raises UsageError if it cannot."""
    key = tuple(tf.TensorSpec(value.shape[1:], value.dtype) for value in inputs)
    with _lock:
        known = _fits.setdefault(metric, {})
        if key not in known:
            # A new thread is eager and in no strategy, no replica and no scope that records or refuses variables. What
            # a metric creates at its first update (F1Score does) are plain variables there, which nobody reads.
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_examine, metric, *key).result()
            if isinstance(found, str):
                raise UsageError(
                    f"keras_metric cannot use {metric.name!r} ({type(metric).__name__}): {found}; or give all examples "
                    'to a function of yours, in an eval step: gather(compute, y_true, y_pred, weight=batch["weight"]).'
                )
            known[key] = found
        return known[key]


_LAST_AXIS = " (many average over the last axis: make y_true and y_pred [batch, 1])"


def _examine(metric: Any, *specs: tf.TensorSpec) -> _Fit | str:
    """Return how the metric takes its weights, else the reason why it cannot be used and what to do."""
    try:
        inspect.signature(metric.update_state).bind(None, None, sample_weight=None)
    except TypeError:
        return (
            "its update_state does not take (y_true, y_pred, sample_weight), and padding would count; write it so, "
            "use mean(values, weight)"
        )
    ranks = [len(spec.shape) + 1 for spec in specs]
    # IoU metrics flatten y_true, but do not spread the weights over it.
    all_axes = (0, *(axes for axes in (ranks[0], ranks[0] - 1) if axes > ranks[2]))
    hint = _LAST_AXIS if ranks[1] == 1 else ""
    y_true, y_pred, weight = _made_up(*specs)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fractional weights for integers, which are found out here
        for axes in all_axes:
            try:
                _build(metric, axes, *specs)
                found = _examine_with(metric, axes, y_true, y_pred, weight)
            except Exception as error:  # any: it comes from the metric
                text = " ".join(re.sub(r"{{.*?}}", "", str(error)).split())[:200]
                found = (
                    f"it raised {type(error).__name__} ({text}) on made-up {y_true.dtype.name} y_true {y_true.shape} "
                    f"and {y_pred.dtype.name} y_pred {y_pred.shape}; give it what it expects{hint}, return "
                    "Metric(parts, compute) yourself"
                )
            if isinstance(found, _Fit):
                return found
            reasons.append(found)
    return reasons[0]


def _build(metric: Any, axes: int, *specs: tf.TensorSpec) -> None:
    """Let a metric make the variables that it makes at its first update, as F1Score does. Nothing is computed."""

    def update(y_true: tf.Tensor, y_pred: tf.Tensor, weight: tf.Tensor) -> None:
        metric.update_state(y_true, y_pred, sample_weight=_as_taken(weight, y_true, _Fit(axes)))

    # Keras puts off the making of variables to the end of this scope; those that are there stay unread.
    with keras.StatelessScope([(v, tf.zeros(v.shape, v.dtype)) for v in metric.variables]):
        batch = [tf.TensorSpec([8, *spec.shape], spec.dtype) for spec in specs]
        tf.function(update, autograph=False).get_concrete_function(*batch)


def _examine_with(metric: Any, axes: int, y_true: tf.Tensor, y_pred: tf.Tensor, weight: tf.Tensor) -> _Fit | str:
    """Compare the states after examples A, B, both at once and one after the other, with and without padding."""
    variables = metric.variables
    if not variables:
        return "it has no variables that could be summed; keep its state in add_variable"
    zeros = [np.zeros(tuple(v.shape)) for v in variables]

    def update(rows: slice, weight: tf.Tensor, start: list[np.ndarray] = zeros) -> list[np.ndarray]:
        taken = _as_taken(weight[rows], y_true[rows], _Fit(axes))
        state = metric.stateless_update_state(start, y_true[rows], y_pred[rows], sample_weight=taken)
        return [np.asarray(keras.ops.convert_to_numpy(value), np.float64) for value in state]

    for variable, value in zip(variables, metric.stateless_reset_state(), strict=True):
        if value is variable or np.any(keras.ops.convert_to_numpy(value)):
            return f"reset_state does not set its variable {variable.name!r} to 0, where a sum starts; let it do so"
    a, b, both, none = slice(0, 3), slice(3, None), slice(None), tf.zeros_like(weight)
    one, two = update(a, weight), update(b, weight)
    if not all(np.isfinite(value).all() for value in one + two):
        return "its state is not finite for made-up labels and probabilities; return Metric(parts, compute)"
    only_a = tf.concat([weight[a], none[b]], axis=0)
    padding = [x - y + z for x, y, z in zip(update(both, only_a), one, update(b, none), strict=True)]
    if _matters(metric, one, padding):
        hint = _LAST_AXIS if y_pred.shape.rank == 1 else ""
        return f"examples of weight 0, such as padding, change it; let its update_state weight them{hint}"
    many = [1000 * value for value in one]  # a moving average is nearly a sum as long as its state is small
    for what, found, before in (
        ("after another", update(b, weight, many), many),
        ("together with others", update(both, weight), one),
    ):
        if not all(_close(x - y, z, w) for x, y, z, w in zip(found, before, two, one, strict=True)):
            return f"its state is not a sum over examples: {what}, the same examples add something else to it"
    ones = tf.ones_like(weight)
    cut_off = [np.any(x) and not np.any(y) for x, y in zip(update(both, ones), update(both, ones / 2), strict=True)]
    return _Fit(axes, whole=any(cut_off))


def _matters(metric: Any, state: list[np.ndarray], change: list[np.ndarray]) -> bool:
    """Return whether a change of the state is more than rounding and shows in the result, now or when it has grown.

    R2Score counts padded rows in a variable that only its adjusted form uses.
    """
    changes = [np.where(_close(x, np.zeros_like(x), y), 0, x) for x, y in zip(change, state, strict=True)]
    if not any(np.any(x) for x in changes):
        return False
    states = [state, *([x + factor * y for x, y in zip(state, changes, strict=True)] for factor in (1, 1000))]
    now, *later = [keras.tree.flatten(_result(metric, values)) for values in states]
    pairs = [pair for other in later for pair in zip(now, other, strict=True)]
    return not all(np.array_equal(*pair, equal_nan=True) for pair in pairs)


def _close(value: np.ndarray, expected: np.ndarray, like: np.ndarray) -> bool:
    """Compare within rounding of sums as large as `expected` or `like`; a NaN is never close."""
    scale = max(np.abs(expected).max(initial=0), np.abs(like).max(initial=0))
    return bool(np.all(np.abs(value - expected) <= 1e-3 * scale))


def _made_up(*specs: tf.TensorSpec) -> tuple[tf.Tensor, ...]:
    """Make eight labels, probabilities and whole weights, the same in every run; of long sequences four positions.

    In float32 instead of 16 bits, whose rounding looks like a dependence on the other examples.
    """
    positions = specs[1].shape.as_list()[:-1]

    def shape(spec: tf.TensorSpec) -> list[int]:
        sizes: Any = zip(spec.shape.as_list(), [*positions, *[0] * len(spec.shape)], strict=False)
        return [8, *(min(size, 4) if size == position else size for size, position in sizes)]

    true_shape, pred_shape, weight_shape = (shape(spec) for spec in specs)
    generator = np.random.default_rng(0)
    is_score = specs[1].dtype.is_floating
    has_classes = is_score and len(pred_shape) > 1 and pred_shape[-1] > 1
    classes = pred_shape[-1] if has_classes else 2
    odds = np.exp(generator.normal(0, 3, pred_shape))
    probabilities = odds / odds.sum(axis=-1, keepdims=True) if has_classes else odds / (1 + odds)
    y_pred = probabilities if is_score else generator.integers(0, 2, pred_shape)
    if has_classes and true_shape == pred_shape:
        y_true = np.eye(classes)[generator.integers(0, classes, true_shape[:-1])]
    else:
        y_true = generator.integers(0, classes, true_shape)
    weight = generator.integers(1, 4, weight_shape)
    dtypes = [tf.float32 if spec.dtype.is_floating else spec.dtype for spec in specs]
    return tuple(tf.cast(value, dtype) for value, dtype in zip((y_true, y_pred, weight), dtypes, strict=True))
