"""What a user hands over: a `Task` of functions, and the `State` that they train."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import keras
import tensorflow as tf

from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.metrics import Metric
from distloop.pipeline import Batch, Source
from distloop.sharding import ShardedSlot
from distloop.tasks import arguments_for, find

_OWN_NAMES = ("step", "parts", "added", "averages", "sharded")
StepFn = Callable[["State", Batch], Mapping[str, Metric]]


@final
class State:
    """Hold by name what a run trains and saves: Keras models, optimizers, seed generators and variables; adds `step`.

        State(model=model, optimizer=keras.optimizers.Adam(1e-3))      # then state.model, state.optimizer

    Make it inside `Task.build`. An optimizer that is not built yet is built over the only model's weights. `step` is an
    int64 `tf.Variable`. `added` holds the variables that the run's settings need, by name; `averages`, the moving
    averages of weights, as pairs (variable, average) by id of the variable; `sharded`, the slots that are shared out
    over the replicas, by id of the optimizer's variable.
    """

    def __init__(self, **parts: Any) -> None:
        kinds = keras.Layer | keras.optimizers.Optimizer | tf.Variable | keras.Variable | keras.random.SeedGenerator
        for name, part in parts.items():
            if name in _OWN_NAMES or not isinstance(part, kinds):
                raise UsageError(
                    f"State got {name}={type(part).__name__}; expected Keras models, optimizers, seed "
                    f"generators or variables (and not the names {', '.join(_OWN_NAMES)}, which are its own)."
                )
        _check_scope(parts)
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
        self.added: dict[str, tf.Variable] = {}
        self.averages: dict[int, tuple[keras.Variable, tf.Variable]] = {}
        self.sharded: dict[int, ShardedSlot] = {}
        self.step = tf.Variable(tf.constant(0, tf.int64), trainable=False, name="step")

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        raise AttributeError(f"this State holds {', '.join(parts)} and step, but no {name!r}")


def _check_scope(parts: Mapping[str, Any]) -> None:
    strategy = tf.distribute.get_strategy()
    for name, variable in _variables_of(parts, {}).items():
        if not strategy.extended.variable_created_in_scope(variable):
            raise UsageError(
                f"the variable {name!r} was not made in the strategy's scope, so that replicas would not share it; "
                "make models, optimizers and variables in the task's build function, not before."
            )


@dataclass(frozen=True)
class Task:
    """Bundle the functions of one training problem.

    A source is a dict of arrays with a common first axis, a finite `tf.data.Dataset` of single examples (dicts), or a
    Pipeline over these or over TFRecord files, in a fixed order: the library shuffles, batches, pads and shares out.
    Batches are dicts of `[local_batch, ...]` with `"weight"` `[local_batch]` float32, 0 for padding; a source's own
    feature `"weight"` is the weight of the example in the loss. Steps run in replica context and call no
    `tf.distribute` function; they are traced once as plain Python, so a branch on a tensor is `tf.cond` or `tf.where`.
    """

    build: Callable[[], State]
    train_step: StepFn
    train_data: Callable[[], Source]
    eval_step: StepFn | None = None
    eval_data: Callable[[], Source] | None = None

    def __post_init__(self) -> None:
        if (self.eval_step is None) != (self.eval_data is None):
            raise UsageError("the task has one of eval_step and eval_data; give it both to evaluate, or none.")


def named_variables(state: State) -> dict[str, Any]:
    """Return every variable of `state` by a name that is the same in every run of the same code.

    Each is a tf.Variable, or a ShardedSlot that stands for one.
    """
    return {"step": state.step, **state.added, **_variables_of(state.parts, state.sharded)}


def _variables_of(parts: Mapping[str, Any], sharded: Mapping[int, ShardedSlot]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for part_name, part in parts.items():
        if isinstance(part, tf.Variable | keras.Variable):
            variables[part_name] = part
            continue
        # `.variables` of a model has its seed states too, which `.weights` and tf.train.Checkpoint leave out.
        for variable in [part.state] if isinstance(part, keras.random.SeedGenerator) else part.variables:
            name = f"{part_name}/{variable.path}"
            if isinstance(part, keras.optimizers.Optimizer):  # Adafactor names its slots alike; their order is fixed
                repeated = sum(one == name or one.startswith(f"{name}#") for one in variables)
                name += f"#{repeated}" if repeated else ""
            if name in variables:
                raise UsageError(f"two variables are named {name!r}; give the layers of {part_name!r} different names.")
            variables[name] = variable
    return {name: sharded.get(id(v), v.value) if isinstance(v, keras.Variable) else v for name, v in variables.items()}


def check_layers(state: State, *, replicas: int, jit_compile: bool) -> None:
    """Raise UsageError if `state` holds a layer that cannot run on several replicas as asked for."""
    layers = {
        f"{layer.name!r} of {name!r}": layer
        for name, part in state.parts.items()
        if isinstance(part, keras.Layer) and replicas > 1
        for layer in part._flatten_layers()
    }
    for name, layer in layers.items():
        if getattr(layer, "stateful", False):
            raise UsageError(
                f"the layer {name} is stateful=True: its state belongs to the examples of one replica; "
                "train it on one replica, or carry the state in the batch."
            )
        if jit_compile and getattr(layer, "synchronized", False):
            raise UsageError(
                f"the layer {name} is synchronized=True: it exchanges statistics between the {replicas} replicas "
                "in the part that --jit_compile compiles; drop the flag, or synchronized=True."
            )


def load_task(name: str | None, config: RunConfig) -> Task:
    """Import the task's module and return `make_task(config, **task_args)`.

    Raises UsageError if there is no Task to be had, and for arguments that it does not take.
    """
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
    task = make_task(config, **arguments_for(make_task, config.task_args))
    if not isinstance(task, Task):
        raise UsageError(f"task {name!r}: {function}(config) returned {type(task).__name__}; expected a distloop.Task.")
    return task
