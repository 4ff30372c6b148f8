"""Steps without one of their parts: what they are faster by is its cost. Only time counts, the numbers are wrong."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import tensorflow as tf

import distloop.reduction
from benchmarks.bare_steps import needed
from distloop import gradients, metrics


class Reduced(NamedTuple):
    """Hold what the reduction of a traced step carries, in bytes a replica."""

    dense_bytes: int
    sparse_bytes: int  # values and indices of rows
    rows: tuple[int | None, ...]  # of each gradient that is sparse; None of one that is dense


@contextlib.contextmanager
def reduction() -> Iterator[None]:
    """Let steps that are traced in here exchange nothing: each replica trains by itself."""
    with _replaced(lambda values, **_: values):
        yield


@contextlib.contextmanager
def update() -> Iterator[None]:
    """Let steps that are traced in here compute and reduce gradients and apply none."""

    def only_compute(optimizer: Any, found: Any, variables: Any) -> None:
        optimizer.iterations.assign_add(1 + tf.cast(needed(found), optimizer.iterations.dtype))

    with mock.patch.object(gradients, "_apply", only_compute):
        yield


@contextlib.contextmanager
def nothing(found: list[Reduced]) -> Iterator[None]:
    """Append to `found` what each reduction carries that is traced in here."""
    original = distloop.reduction.all_reduce_sum

    def look(values: Any, **options: Any) -> Any:
        gradients_of_step = values[0] if isinstance(values, tuple) else []
        sparse = [g for g in gradients_of_step if isinstance(g, tf.IndexedSlices)]
        dense = [g for g in gradients_of_step if not isinstance(g, tf.IndexedSlices)]
        if gradients_of_step:
            of_rows = [part for g in sparse for part in (g.values, g.indices)]
            rows = tuple(g.indices.shape[0] if isinstance(g, tf.IndexedSlices) else None for g in gradients_of_step)
            found.append(Reduced(_bytes(dense), _bytes(of_rows), rows))
        return original(values, **options)

    with _replaced(look):
        yield


def _bytes(tensors: list[Any]) -> int:
    return sum((tensor.shape.num_elements() or 0) * tensor.dtype.size for tensor in tensors)


@contextlib.contextmanager
def _replaced(function: Any) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for module in (distloop.reduction, metrics, gradients):  # two have imported it by its name
            patches.enter_context(mock.patch.object(module, "all_reduce_sum", function))
        yield
