"""Decode once: examples of any source as arrays, in memory or on disk, which are read by index from then on."""

import hashlib
import json
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.errors import UsageError
from distloop.pipeline import Pipeline, Source, as_pipeline, explain
from distloop.records import Records, in_turn
from distloop.sources import check_features, count_examples, describe_source

_BATCH = 256  # examples that are decoded at a time


def in_memory(source: Source) -> dict[str, np.ndarray]:
    """Decode all examples of a source once and return them as arrays `[examples, ...]`.

    Arrays are shuffled completely and resumed at once; worth it for whatever fits in memory on every worker. Raises
    UsageError for a source without an end or without examples, and for a Pipeline with `augment`, which each epoch does
    anew: use `Pipeline(in_memory(...), augment=...)`.
    """
    pipeline, _ = _checked(source, "the data set given to in_memory")
    batches = list(_batches(pipeline))
    return {feature: np.concatenate([batch[feature] for batch in batches]) for feature in batches[0]}


def on_disk(source: Source, folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Decode all examples of a source once into `.npy` files of a local `folder`; return them as memory maps.

    What `in_memory` is for data that does not fit: rows are read by index from disk, and the next start only opens the
    files. Workers of one host may do it at the same time. Raises UsageError as in_memory does, for strings, and for
    a folder that holds anything else, such as what an earlier `map` has made.
    """
    folder = Path(folder).resolve()
    name = f"the data set given to on_disk({str(folder)!r})"
    pipeline, num_examples = _checked(source, name)
    features = check_features(pipeline, name)
    for feature, spec in features.items():
        if np.dtype(spec.dtype.as_numpy_dtype).kind not in "biufc":
            raise UsageError(
                f"{name} yields {feature!r} of type {spec.dtype.name}; expected numbers: decode it in map."
            )
    shapes = {feature: f"{spec.dtype.name} {spec.shape}" for feature, spec in features.items()}
    stamp = {"examples": num_examples, "source": describe_source(pipeline), "code": _code(pipeline), **shapes}
    if not folder.exists():
        _write(pipeline, features, num_examples, stamp, folder)
    try:
        found = json.loads((folder / "examples.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != stamp:
        raise UsageError(
            f"the folder {folder} holds other data than this pipeline makes, or other files; remove it to have it "
            "written again, or give on_disk another folder."
        )
    return {feature: np.load(_file(folder, feature), mmap_mode="r") for feature in features}


def _checked(source: Source, name: str) -> tuple[Pipeline, int]:
    pipeline = as_pipeline(source)
    if pipeline.augment is not None:
        raise UsageError(f"{name} has augment, which would be done once for all epochs; put it around the result.")
    num_examples = count_examples(pipeline, name)
    check_features(pipeline, name)
    return pipeline, num_examples


@tf.autograph.experimental.do_not_convert
def _batches(pipeline: Pipeline) -> Iterator[dict[str, np.ndarray]]:
    """Yield all examples in the order of the source, many at a time."""
    base = pipeline.base
    elements: Any = in_turn(base) if isinstance(base, Records) else base
    if isinstance(elements, Mapping):
        columns: Any = dict(elements)
        elements = tf.data.Dataset.from_tensor_slices(columns)
    if pipeline.changes_examples:
        pack = isinstance(elements.element_spec, tuple)
        elements = elements.map(
            lambda *element: pipeline.example(element if pack else element[0]),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    batches = elements.batch(_BATCH)
    try:
        mapped: Any = batches if pipeline.map_batch is None else batches.map(pipeline.map_batch)
        yield from mapped.as_numpy_iterator()
    except tf.errors.InvalidArgumentError as error:
        raise explain(error) or error from error


def _write(
    pipeline: Pipeline, features: Mapping[str, tf.TensorSpec], num_examples: int, stamp: Mapping[str, Any], folder: Path
) -> None:
    """Write the files beside `folder` and rename them all at once; who comes second throws its own away."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        arrays, done = {}, 0
        for feature, spec in features.items():
            shape: Any = (num_examples, *spec.shape)
            arrays[feature] = np.lib.format.open_memmap(_file(own, feature), "w+", spec.dtype.as_numpy_dtype, shape)
        for batch in _batches(pipeline):
            size = len(next(iter(batch.values())))
            for feature, array in arrays.items():
                array[done : done + size] = batch[feature]
            done += size
        for array in arrays.values():
            array.flush()
        (own / "examples.json").write_text(json.dumps(stamp))
        own.chmod(0o755)
        try:
            own.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _file(folder: Path, feature: str) -> Path:
    return folder / f"{urllib.parse.quote(feature, safe='')}.npy"


def _code(pipeline: Pipeline) -> str:
    """Return a checksum of the code of the pipeline's functions. What they call or close over is not in it."""
    functions = [pipeline.map, pipeline.map_batch]
    own = " ".join(_text(getattr(function, "__code__", None)) for function in functions) + str(pipeline.pad_to)
    inner = _code(pipeline.source) if isinstance(pipeline.source, Pipeline) else ""
    return hashlib.sha256(f"{own} {inner}".encode()).hexdigest()[:16]


def _text(code: CodeType | None) -> str:
    if code is None:
        return ""
    constants = [_text(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
