"""Metrics as sums: what a step returns adds up over examples, replicas and steps; only the host divides.

mean(losses, batch["weight"])      # replica context: sums over this replica's examples
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.config import UsageError

RESERVED = ("step", "split", "examples_per_second")  # what a line of metrics.jsonl has beside the metrics


@dataclass(frozen=True)
class Mean:
    """Hold a mean as `total / count`: two float32 scalars that add up over replicas and steps.

    `reduced` says that both are already sums over all replicas, as in what `minimize` returns.
    """

    total: tf.Tensor
    count: tf.Tensor
    reduced: bool = False


def mean(values: Any, weight: tf.Tensor) -> Mean:
    """Sum `values` `[local_batch]` with `weight` `[local_batch]` (0 for padding). Replica context, no communication."""
    weight = tf.cast(weight, tf.float32)
    values = tf.cast(values, tf.float32)
    if values.shape.rank != 1 or not values.shape.is_compatible_with(weight.shape):
        raise UsageError(
            f"mean got values of shape {values.shape} and a weight of shape {weight.shape}; "
            "expected one value and one weight an example, both [batch]."
        )
    return Mean(tf.reduce_sum(values * weight), tf.reduce_sum(weight))


def pack(metrics: Sequence[Mean]) -> tf.Tensor:
    """Return all totals and counts as one float32 `[metrics, 2]`."""
    return tf.stack([tf.stack([metric.total, metric.count]) for metric in metrics])


def unpack(packed: tf.Tensor) -> list[Mean]:
    """Return the metrics of a `[metrics, 2]` that was summed over all replicas."""
    return [Mean(row[0], row[1], reduced=True) for row in tf.unstack(packed)]


def all_reduce_sum(values: Any) -> Any:
    """Sum a structure of tensors over all replicas in one packed reduction. Replica context."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def reduce(metrics: Mapping[str, Mean]) -> dict[str, Mean]:
    """Sum over all replicas what is not summed yet: one small reduction, none if `minimize` returned all of them."""
    local = {name: metric for name, metric in metrics.items() if not metric.reduced}
    if not local:
        return dict(metrics)
    return {**metrics, **dict(zip(local, unpack(all_reduce_sum(pack(list(local.values())))), strict=True))}


def check(metrics: object) -> dict[str, Mean]:
    """Return what a step returned if it is a dict of metrics, else raise UsageError."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise UsageError(
            f"the step returned {_describe(metrics)}; expected a dict of named metrics, such as "
            '{"loss": mean(losses, batch["weight"])}.'
        )
    for name, metric in metrics.items():
        if name in RESERVED or str(name).startswith("epoch_"):
            raise UsageError(f"the step returned a metric named {name!r}, which the logs use themselves; rename it.")
        if not isinstance(name, str) or not isinstance(metric, Mean):
            raise UsageError(
                f"the step returned {_describe(metric)} as {name!r}, which is not a metric; "
                'return per-example values as mean(values, batch["weight"]).'
            )
    return dict(metrics)


def _describe(value: object) -> str:
    if isinstance(value, tf.Tensor):
        return f"a tensor of shape {value.shape}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def to_floats(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    """Divide on the host: `sums` `[metrics, 2]` float64 to one float a name; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums[:, 0] / sums[:, 1]
    return dict(zip(names, map(float, values), strict=True))
