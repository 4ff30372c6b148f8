"""What a user hands over: a `Task` of functions, and the `State` that they train."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import keras
import numpy as np
import tensorflow as tf

from distloop.config import RunConfig, UsageError
from distloop.metrics import Mean
from distloop.tasks import find

Batch = dict[str, tf.Tensor]
Source = tf.data.Dataset | Mapping[str, np.ndarray]
StepFn = Callable[["State", Batch], Mapping[str, Mean]]


@final
class State:
    """Hold by name what a run trains and saves: Keras models, optimizers and `tf.Variable`s; adds `step` (int64).

        State(model=model, optimizer=keras.optimizers.Adam(1e-3))      # then state.model, state.optimizer

    Make it inside `Task.build`. An optimizer that is not built yet is built over the only model's weights.
    """

    def __init__(self, **parts: Any) -> None:
        kinds = keras.Layer | keras.optimizers.Optimizer | tf.Variable | keras.Variable
        for name, part in parts.items():
            if name in ("step", "parts") or not isinstance(part, kinds):
                raise UsageError(
                    f"State got {name}={type(part).__name__}; expected Keras models, optimizers or variables "
                    "(and not the names 'step' and 'parts', which are its own)."
                )
        models = {name: part for name, part in parts.items() if isinstance(part, keras.Layer)}
        for name, model in models.items():
            if not model.built:
                raise UsageError(
                    f"the model {name!r} has no weights yet; start it with keras.Input(shape), or call "
                    "its build((None, ...)) in the task's build function."
                )
        for name, part in parts.items():
            if isinstance(part, keras.optimizers.Optimizer) and not part.built:
                if len(models) != 1:
                    raise UsageError(
                        f"the optimizer {name!r} is not built and there are {len(models)} models; "
                        f"call {name}.build(variables) in the task's build function."
                    )
                (model,) = models.values()
                part.build(model.trainable_variables)
        self.parts = parts
        self.step = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="step")

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        raise AttributeError(f"this State holds {', '.join(parts)} and step, but no {name!r}")


@dataclass(frozen=True)
class Task:
    """Bundle the functions of one training problem.

    A source is a dict of arrays with a common first axis, or a finite `tf.data.Dataset` of single examples (dicts),
    in a fixed order: the library shuffles, batches, pads and shares out. Batches are dicts of `[local_batch, ...]` with
    `"weight"` `[local_batch]` float32, 0 for padding; a source's own feature `"weight"` is the weight of the example in
    the loss. Steps run in replica context and call no `tf.distribute`
    function; they are traced once as plain Python, so a branch on a tensor is `tf.cond` or `tf.where`.
    """

    build: Callable[[], State]
    train_step: StepFn
    train_data: Callable[[], Source]
    eval_step: StepFn | None = None
    eval_data: Callable[[], Source] | None = None

    def __post_init__(self) -> None:
        if (self.eval_step is None) != (self.eval_data is None):
            raise UsageError("the task has one of eval_step and eval_data; give it both to evaluate, or none.")


def check_replicas(state: State, replicas: int) -> None:
    """Raise UsageError if `state` holds statistics that each of several replicas would keep for itself."""
    for name, part in state.parts.items():
        for layer in part._flatten_layers() if isinstance(part, keras.Layer) and replicas > 1 else ():
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable and not layer.synchronized:
                raise UsageError(
                    f"the layer {layer.name!r} of {name!r} would keep other statistics on each of the {replicas} "
                    "replicas, and a checkpoint those of the first; make it BatchNormalization(synchronized=True)."
                )


def load_task(name: str | None, config: RunConfig) -> Task:
    """Import the task's module and return `make_task(config)`. Raises UsageError if either fails to give a Task."""
    module, function = find(name)
    try:
        make_task = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UsageError(
            f"task {name!r}: importing {module!r} failed with {type(error).__name__}: {error}; "
            f"make python -c 'import {module}' work first."
        ) from error
    if not callable(make_task):
        raise UsageError(f"task {name!r}: {module!r} has no function {function!r} to call.")
    task = make_task(config)
    if not isinstance(task, Task):
        raise UsageError(f"task {name!r}: {function}(config) returned {type(task).__name__}; expected a distloop.Task.")
    return task
