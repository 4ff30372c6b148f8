"""Metrics as sums: what a step returns adds up over examples, replicas and steps; only the host computes results.

mean(losses, batch["weight"])      # replica context: sums over this replica's examples
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.errors import UsageError
from distloop.reduction import all_reduce_sum

# What a line of metrics.jsonl has that differs from run to run,
TIMES = ("examples_per_second", "input_wait", "checkpoint_stall_seconds", "checkpoint_write_seconds")
RESERVED = ("step", "split", "counted", *TIMES)  # and all that it has beside the metrics


@dataclass(frozen=True)
class Metric:
    """Hold the tensors that a metric adds up, `parts`, and how the host computes its value from their sums.

        Metric((tf.reduce_sum(nll * weight), tf.reduce_sum(weight)), lambda total, count: math.exp(total / count))

    A part is a sum over this replica's examples, in any static shape, of numbers or bools; examples of weight 0 add 0.
    `compute` takes the sums as float64 arrays, in the shapes of `parts`, and returns a number, an array or a dict.
    Parts are float32 while they cross replicas: a count above 2**24 in one step is rounded. `reduced` says that the
    parts are already sums over all replicas, as in what `minimize` returns; `gathered`, that they are not summed but
    put together, example by example (`gather` makes these).
    """

    parts: tuple[tf.Tensor, ...]
    compute: Callable[..., Any]
    reduced: bool = False
    gathered: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts or not callable(self.compute):
            raise UsageError(
                "Metric got something else than a tuple of tensors and a function of their sums; expected "
                "Metric((total, count), lambda total, count: total / count)."
            )
        parts = tuple(tf.convert_to_tensor(part) for part in self.parts)
        for part in parts:
            if not part.shape.is_fully_defined() or not _is_number(part):
                raise UsageError(
                    f"Metric got a part of shape {part.shape} and dtype {part.dtype.name}; expected numbers in a shape "
                    "that is known before the step runs, such as a sum over the batch."
                )
        object.__setattr__(self, "parts", parts)


def mean(values: Any, weight: Any) -> Metric:
    """Sum `values` with `weight`, both `[local_batch]` or both `[local_batch, time, ...]`; the weights are the count.

    Replica context, no communication. A weight of 0 leaves an entry out, such as padding or a masked token, whatever
    its value; its gradient must still be finite: make the input of a logarithm safe with `tf.where`.
    """
    weight = tf.cast(weight, tf.float32)
    values = tf.cast(values, tf.float32)
    if (
        not values.shape.rank
        or values.shape.rank != weight.shape.rank
        or not values.shape.is_compatible_with(weight.shape)
    ):
        raise UsageError(
            f"mean got values of shape {values.shape} and a weight of shape {weight.shape}; "
            "expected one value and one weight an example, both [batch], or one of each a token, both [batch, time]."
        )
    # 0 * NaN is NaN: what is left out may be anything, such as the loss of a masked token.
    return Metric((tf.reduce_sum(tf.math.multiply_no_nan(values, weight)), tf.reduce_sum(weight)), divide)


def divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return total / count, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / count


def gather(compute: Callable[..., Any], *values: Any, weight: Any) -> Metric:
    """Put the `values`, each `[local_batch, ...]`, of a whole evaluation together and call `compute(*arrays)` once.

        gather(sklearn.metrics.roc_auc_score, batch["label"], scores, weight=batch["weight"])

    For what is no sum. The arrays hold the examples in the order of the data, all of them on every worker, in the
    dtypes of `values` (integers are exact up to 2**53). Examples of weight 0, padding or not, are left out; `compute`
    gets the weights only if they are among `values`. Eval steps only: replicas exchange all values, and the host holds
    them.
    Raises UsageError if a value has not one entry an example.
    """
    weight = tf.convert_to_tensor(weight)

    def without_padding(*arrays: np.ndarray) -> Any:
        return compute(*(array[arrays[-1] != 0] for array in arrays[:-1]))

    parts = tuple(tf.convert_to_tensor(value) for value in (*values, weight))
    for part in parts:
        if weight.shape.rank != 1 or not part.shape.rank or part.shape[0] != weight.shape[0]:
            raise UsageError(
                f"gather got a value of shape {part.shape} and a weight of shape {weight.shape}; expected one entry an "
                "example in each, and the weight [batch]."
            )
    return Metric(parts, without_padding, gathered=True)


def pack(metrics: Mapping[str, Metric]) -> tf.Tensor:
    """Return the parts of all metrics as one float32 vector."""
    parts = [part for metric in metrics.values() for part in metric.parts]
    return tf.concat([tf.zeros([0]), *(tf.reshape(tf.cast(part, tf.float32), [-1]) for part in parts)], axis=0)


def unpack(packed: tf.Tensor, like: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the metrics `like` with their parts from a packed vector that was summed over all replicas."""
    if not like:
        return {}
    parts = iter(tf.split(packed, [_size(part) for metric in like.values() for part in metric.parts]))
    return {
        name: replace(metric, parts=tuple(tf.reshape(next(parts), part.shape) for part in metric.parts), reduced=True)
        for name, metric in like.items()
    }


def reduce_and_pack(
    metrics: Mapping[str, Metric], riders: tf.Tensor, reduced_riders: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum over all replicas what is not summed yet; return all parts packed, and the sum of the `riders` `[n]` float32.

    One small reduction, none if `minimize` returned all of the metrics and took the riders along. Replica context.
    """
    local = {name: metric for name, metric in metrics.items() if not metric.reduced}
    if not local and reduced_riders is not None:
        return pack(metrics), reduced_riders
    packed = pack(local)
    sums = all_reduce_sum(tf.concat([packed, riders], axis=0))
    size = _shape(packed)[0]
    return pack({**metrics, **unpack(sums[:size], local)}), sums[size:] if reduced_riders is None else reduced_riders


def check(metrics: object) -> dict[str, Metric]:
    """Return what a step returned if it is a dict of metrics, else raise UsageError."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise UsageError(
            f"the step returned {_describe(metrics)}; expected a dict of named metrics, such as "
            '{"loss": mean(losses, batch["weight"])}.'
        )
    for name, metric in metrics.items():
        if name in RESERVED or str(name).startswith("epoch_"):
            raise UsageError(f"the step returned a metric named {name!r}, which the logs use themselves; rename it.")
        if not isinstance(name, str) or not isinstance(metric, Metric):
            raise UsageError(
                f"the step returned {_describe(metric)} as {name!r}, which is not a metric; "
                'return per-example values as mean(values, batch["weight"]).'
            )
    return dict(metrics)


def pack_gathered(metrics: Mapping[str, Metric]) -> tf.Tensor:
    """Return the gathered metrics' parts of all replicas, float64 `[global_batch, width]`, in replica order.

    One all-gather, none if there is no such metric. float64 holds labels and ids exactly. Replica context.
    """
    parts = [part for metric in metrics.values() if metric.gathered for part in metric.parts]
    if not parts:
        return tf.zeros([1, 0], tf.float64)
    columns = [tf.reshape(tf.cast(part, tf.float64), [part.shape[0], -1]) for part in parts]
    return tf.distribute.get_replica_context().all_gather(tf.concat(columns, axis=1), axis=0)


def results(metrics: Mapping[str, Metric], sums: np.ndarray, gathered: np.ndarray | None = None) -> dict[str, float]:
    """Compute on the host: the packed `sums` `[size]` float64 of `metrics` to floats by name.

    `gathered` `[examples, width]` is what `pack_gathered` put together. A value that is an array becomes `name_0`,
    `name_1`, ...; a dict, `name_key`. Raises UsageError if two values get the same name.
    """
    begin, column, floats = 0, 0, {}
    for name, metric in metrics.items():
        arrays = []
        for part in metric.parts:
            if metric.gathered and gathered is not None:
                shape = _shape(part)[1:]
                width = math.prod(shape)
                array = gathered[:, column : column + width].reshape([-1, *shape])
                arrays.append(array.astype(part.dtype.as_numpy_dtype))
                column += width
            else:
                arrays.append(sums[begin : begin + _size(part)].reshape(_shape(part)))
                begin += _size(part)
        for key, value in to_floats(name, metric.compute(*arrays)).items():
            if key in floats:
                raise UsageError(f"two values of the step's metrics are named {key!r}; rename the metric {name!r}.")
            floats[key] = value
    return floats


def not_finite(metrics: Mapping[str, Metric], sums: np.ndarray) -> list[str]:
    """Return the names of the metrics with an infinity or a NaN in the packed `sums`."""
    names = [name for name, metric in metrics.items() for part in metric.parts for _ in range(_size(part))]
    return list(dict.fromkeys(name for name, value in zip(names, sums, strict=True) if not np.isfinite(value)))


def to_floats(name: str, value: Any) -> dict[str, float]:
    """Return a computed value as one float by name, or one for each entry of an array or a dict (of these).

    Raises UsageError if it is none of them.
    """
    if isinstance(value, Mapping):
        named = [to_floats(f"{name}_{key}", entry) for key, entry in value.items()]
        return {key: number for entry in named for key, number in entry.items()}
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = None
    if value is None or array is None:
        raise UsageError(
            f"the metric {name!r} computed {_describe(value)}; expected a number, an array or a dict of these."
        )
    if array.size == 1:
        return {name: array.item()}
    return {f"{name}_{index}": entry for index, entry in enumerate(array.ravel().tolist())}


def _shape(part: tf.Tensor) -> list[int]:
    shape: Any = part.shape.as_list()
    return shape


def _size(part: tf.Tensor) -> int:
    return math.prod(_shape(part))


def _is_number(part: tf.Tensor) -> bool:
    return part.dtype.is_floating or part.dtype.is_integer or part.dtype.is_bool


def _describe(value: object) -> str:
    if isinstance(value, tf.Tensor):
        return f"a tensor of shape {value.shape}"
    return "nothing" if value is None else f"a {type(value).__name__}"
