"""What is checked of a source before a run: that it can be batched, how long it is, and what workers compare of it."""

import zlib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.determinism import check_deterministic
from distloop.errors import UsageError
from distloop.pipeline import Pipeline
from distloop.records import Records


def count_examples(pipeline: Pipeline, name: str) -> int:
    """Return how many examples a source (`name` in messages) has; raise UsageError if that is none or unknown."""
    base = pipeline.base
    if isinstance(base, tf.data.Dataset):
        if not pipeline.changes_examples and pipeline.map_batch is None:
            check_elements(base.element_spec, name)
        num_examples = int(base.cardinality())
        if num_examples == tf.data.UNKNOWN_CARDINALITY:
            raise UsageError(
                f"{name} does not know its length; end it with .apply(tf.data.experimental.assert_cardinality(n))."
            )
        if num_examples == tf.data.INFINITE_CARDINALITY:
            raise UsageError(f"{name} is endless; drop .repeat(), the library repeats it.")
    else:
        num_examples = len(base) if isinstance(base, Records) else _common_length(base, name)
    if num_examples == 0:
        raise UsageError(f"{name} has no examples; expected at least one: check its filters, its folder and its split.")
    return num_examples


@tf.autograph.experimental.do_not_convert
def check_features(pipeline: Pipeline, name: str) -> dict[str, tf.TensorSpec]:
    """Return the features of one example as a step gets them; raise UsageError if they vary, or are not determined.

    Every function of the pipeline is traced, none is run.
    """
    base = pipeline.base
    elements: Any
    if isinstance(base, tf.data.Dataset):
        elements = base
    elif isinstance(base, Records):
        elements = tf.data.Dataset.from_tensors(tf.constant(b""))
    else:
        row = {k: (np.shape(a)[1:], tf.as_dtype(np.asarray(a[:1]).dtype)) for k, a in base.items()}
        elements = tf.data.Dataset.range(1).map(lambda _: {k: tf.zeros(*shape_type) for k, shape_type in row.items()})
    if pipeline.changes_examples:
        pack = isinstance(elements.element_spec, tuple)
        seed = tf.zeros([2], tf.int64)
        elements = elements.map(lambda *element: pipeline.example(element if pack else element[0], seed))
    if pipeline.map_batch is None:
        check_elements(elements.element_spec, name)
    else:
        batches = elements.batch(1, drop_remainder=True).map(pipeline.map_batch)
        check_elements(batches.unbatch().element_spec, f"{name} after map_batch")
        elements = batches.unbatch()
    check_deterministic(elements, name)
    return dict(elements.element_spec)


def describe_source(pipeline: Pipeline) -> dict[str, str]:
    """Return what tells sources apart: names and sizes of files, and a checksum of up to 1,000 rows of each array.

    A `tf.data.Dataset` is not read for it.
    """
    base = pipeline.base
    if isinstance(base, tf.data.Dataset):
        return {}
    if isinstance(base, Records):
        lines = [
            f"{PurePath(f).name} {size} {n}" for f, size, n in zip(base.files, base.sizes, base.counts, strict=True)
        ]
        crc = zlib.crc32("\n".join(lines).encode())
        return {"files": f"{len(lines)} from {PurePath(base.files[0]).name}, {sum(base.sizes):,} bytes, crc {crc:08x}"}
    described = {}
    for name, array in base.items():
        rows = np.asarray(array[:: -(-len(array) // 1000)])
        described[name] = f"{rows.dtype} {rows.shape[1:]} crc {zlib.crc32(np.ascontiguousarray(rows).tobytes()):08x}"
    return described


def check_elements(spec: object, name: str) -> None:
    """Raise UsageError unless `spec` is that of single examples: a flat dict of tensors of fixed shapes."""
    if not isinstance(spec, Mapping) or not all(isinstance(feature, tf.TensorSpec) for feature in spec.values()):
        raise UsageError(
            f"{name} yields {spec}; expected a flat dict of tensors an example, such as "
            '.map(lambda x, y: {"image": x, "label": y}).'
        )
    for feature, tensor in spec.items():
        if not tensor.shape.is_fully_defined():
            raise UsageError(
                f"{name} yields {feature!r} of shape {tensor.shape}; expected single examples of one fixed shape: "
                "drop .batch(), which the library does, and pad, crop or resize what varies."
            )
    _check_weight(spec["weight"].shape.as_list() if "weight" in spec else [], name)


def _common_length(arrays: object, name: str) -> int:
    if not isinstance(arrays, Mapping) or not arrays:
        raise UsageError(f"{name} is a {type(arrays).__name__}; expected a tf.data.Dataset or a dict of arrays.")
    lengths = {feature: np.shape(array)[:1] for feature, array in arrays.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        shapes = {feature: np.shape(array) for feature, array in arrays.items()}
        raise UsageError(f"{name} has arrays of shapes {shapes}; expected one entry an example in each.")
    _check_weight(list(np.shape(arrays["weight"])[1:]) if "weight" in arrays else [], name)
    return next(iter(lengths.values()))[0]


def _check_weight(shape: list[int], name: str) -> None:
    if shape:
        raise UsageError(
            f"{name} has a 'weight' of shape {shape} an example; expected one number, the weight of the example "
            "in the loss: reshape it, or rename it if it is something else."
        )
