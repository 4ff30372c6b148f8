"""Train with one step function on any `tf.distribute` strategy; the names below are the whole index.

Names load on first use, so `import distloop` imports nothing else and a launcher never loads TensorFlow.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:  # the same table as below, in the form that type checkers and editors read
    from distloop.caching import in_memory, on_disk
    from distloop.config import RunConfig
    from distloop.datasets import load_tfds
    from distloop.errors import NotFiniteError, PeerLostError, PreflightError, Stopped, StorageError, UsageError
    from distloop.evaluation import evaluate
    from distloop.experiment import train
    from distloop.gradients import minimize
    from distloop.keras_metrics import keras_metric
    from distloop.metrics import Metric, gather, mean
    from distloop.pipeline import Pipeline
    from distloop.records import load_tfrecords
    from distloop.serving import export
    from distloop.task import State, Task

__version__ = "0.1.0"

_HOMES = {
    "NotFiniteError": "errors",
    "PeerLostError": "errors",
    "PreflightError": "errors",
    "RunConfig": "config",
    "Stopped": "errors",
    "StorageError": "errors",
    "UsageError": "errors",
    "in_memory": "caching",
    "on_disk": "caching",
    "load_tfds": "datasets",
    "evaluate": "evaluation",
    "train": "experiment",
    "minimize": "gradients",
    "keras_metric": "keras_metrics",
    "Metric": "metrics",
    "gather": "metrics",
    "mean": "metrics",
    "export": "serving",
    "Pipeline": "pipeline",
    "load_tfrecords": "records",
    "State": "task",
    "Task": "task",
}

__all__ = [
    "Metric",
    "NotFiniteError",
    "PeerLostError",
    "Pipeline",
    "PreflightError",
    "RunConfig",
    "State",
    "Stopped",
    "StorageError",
    "Task",
    "UsageError",
    "evaluate",
    "export",
    "gather",
    "in_memory",
    "keras_metric",
    "load_tfds",
    "load_tfrecords",
    "mean",
    "minimize",
    "on_disk",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_import_module(f"distloop.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'distloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
