"""The input pipeline that a user wants: where examples come from, and what is done to each and to a batch of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, final

import numpy as np
import tensorflow as tf

from distloop.errors import UsageError
from distloop.records import Records

Batch = dict[str, tf.Tensor]
Source = Union["Pipeline", Records, tf.data.Dataset, Mapping[str, np.ndarray]]


@final
@dataclass(frozen=True, eq=False)
class Pipeline:
    """Say how the elements of a source become examples and batches; the library shuffles, batches and shares out.

        Pipeline(load_tfrecords("data/train-*"), map=decode, augment=flip, pad_to={"tokens": 128})

    In this order: `map(element)` decodes one element into a dict of tensors; `pad_to` fills features up with zeros to
    a length (an int, or one for each leading axis); `augment(example, seed)` changes it at random, in training only:
    `seed` int64 `[2]` is for `tf.random.stateless_*`, and depends on the run's seed, the epoch and the example alone;
    `map_batch(batch)` changes dicts of `[n, ...]`, each row for itself. All run in parallel, in a fixed order, and are
    traced as plain Python without AutoGraph. The source may be a Pipeline with `map` and `pad_to`, whose come first.
    """

    source: Source
    map: Callable[[Any], Any] | None = None
    augment: Callable[[Any, tf.Tensor], Any] | None = None
    map_batch: Callable[[Any], Any] | None = None
    pad_to: Mapping[str, int | Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Pipeline) and (self.source.augment or self.source.map_batch):
            raise UsageError(
                "a Pipeline is the source of another one and has augment or map_batch; expected these in the outer "
                "one, which has the last word on examples and batches: move them there."
            )
        for name in ("map", "augment", "map_batch"):
            if not callable(getattr(self, name) or print):
                raise UsageError(
                    f"{name} of a Pipeline is a {type(getattr(self, name)).__name__}; expected a function."
                )

    @property
    def base(self) -> Records | tf.data.Dataset | Mapping[str, np.ndarray]:
        """Return the innermost source, which is no Pipeline."""
        return self.source.base if isinstance(self.source, Pipeline) else self.source

    @property
    def changes_examples(self) -> bool:
        """Return whether each example goes through a function of its own."""
        inner = isinstance(self.source, Pipeline) and self.source.changes_examples
        return inner or self.map is not None or self.augment is not None or bool(self.pad_to)

    def example(self, element: Any, seed: tf.Tensor | None = None) -> Any:
        """Return what `element` of the base becomes; `seed` int64 `[2]` is for `augment`."""
        example = self.source.example(element) if isinstance(self.source, Pipeline) else element
        if self.map is not None:
            example = _call(self.map, example)
        if self.pad_to:
            example = _pad(example, self.pad_to)
        return example if self.augment is None else self.augment(example, seed)  # pyright: ignore[reportArgumentType]

    def batch(self, examples: Any) -> Any:
        """Return what a batch of examples becomes."""
        return examples if self.map_batch is None else _call(self.map_batch, examples)


def _call(function: Callable[..., Any], element: Any) -> Any:
    """Call `function` as `Dataset.map` does: with the parts of a tuple as arguments."""
    return function(*element) if isinstance(element, tuple) else function(element)


def as_pipeline(source: Source) -> Pipeline:
    """Return `source`, or the pipeline of nothing but it."""
    return source if isinstance(source, Pipeline) else Pipeline(source)


def _pad(example: Any, pad_to: Mapping[str, int | Sequence[int]]) -> Any:
    padded = dict(example)
    for name, lengths in pad_to.items():
        if name not in padded:
            raise UsageError(f"pad_to names {name!r}; expected one of the features {', '.join(padded)}.")
        value, lengths = padded[name], [lengths] if isinstance(lengths, int) else list(lengths)
        if isinstance(value, tf.SparseTensor):  # what tf.io.VarLenFeature gives
            value = tf.sparse.to_dense(value)
        axes = len(lengths)
        if value.shape.rank is None or value.shape.rank < axes:
            raise UsageError(f"pad_to gives {name!r} {axes} lengths; it has the shape {value.shape}.")
        missing = lengths - tf.shape(value)[:axes]
        said = f"pad_to gives {name} the length {'x'.join(map(str, lengths))}, and an example is longer"
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(missing >= 0), [said])]):
            after = tf.pad(missing, [[0, value.shape.rank - axes]])
        paddings = tf.stack([tf.zeros_like(after), after], axis=1)
        padded[name] = tf.pad(value, paddings, constant_values=tf.zeros([], value.dtype))
        padded[name].set_shape([*lengths, *value.shape[axes:]])
    return padded


def explain(error: tf.errors.InvalidArgumentError) -> UsageError | None:
    """Return what the reading of data says in one sentence, if it was stopped by an example too long for `pad_to`."""
    found = re.search(r"pad_to gives \S+ the length \S+, and an example is longer", str(error))
    return UsageError(f"{found[0]}; give it a greater length, or cut it in map.") if found else None
