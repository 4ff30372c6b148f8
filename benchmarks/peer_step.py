"""The step that the hand-written loops and Orbit share: the task's own loss, as a user of tf.distribute trains it."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple
from unittest import mock

import keras
import tensorflow as tf

from distloop import gradients
from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.metrics import Metric, divide, mean, pack
from distloop.startup import Setup
from distloop.task import Batch

# Settings that the peers follow, and those that say nothing of a step; the rest must have their defaults.
_FOLLOWED = (
    *("task", "task_args", "workdir", "strategy", "replicas", "dataset", "data_dir", "global_batch_size", "seed"),
    *("learning_rate", "precision", "jit_compile", "deterministic", "epochs", "train_steps", "steps_per_call"),
    *("eval_every_steps", "checkpoint_every_steps", "keep_checkpoints", "best_metric", "best_mode"),
)


class Forward(NamedTuple):
    """Hold what a replica found on its way to the gradients."""

    share: tf.Tensor  # what it adds to the mean loss of the global batch
    metrics: dict[str, Metric]  # its own sums and counts; the loss comes first
    variables: Sequence[keras.Variable]  # what `minimize` was to update


class Layout(NamedTuple):
    """Say of a `Forward` what is known before a step runs."""

    parts: list[str]  # the metrics' parts by name
    size: int  # of all of them together
    variables: Sequence[keras.Variable]


def check(setup: Setup, dataset: Any) -> None:
    """Raise UsageError unless the peers can train this on that."""
    for setting in fields(RunConfig):
        value = getattr(setup.config, setting.name)
        if setting.name not in _FOLLOWED and value != setting.default:
            raise UsageError(f"{setting.name} is {value}, which only distloop follows; drop it to compare with peers.")
    if not hasattr(dataset, "element_spec"):
        raise UsageError("the peers read a tf.data dataset, not batches held on the device; use --mode=h2d.")


def optimizer_of(setup: Setup) -> keras.optimizers.Optimizer:
    """Return the optimizer of the state, with Keras's loss scale around it if the precision needs one.

    Raises UsageError if there are several.
    """
    optimizers = [part for part in setup.state.parts.values() if isinstance(part, keras.optimizers.Optimizer)]
    if len(optimizers) != 1:
        raise UsageError(f"the task has {len(optimizers)} optimizers; the peers train tasks with one.")
    (optimizer,) = optimizers
    if setup.config.precision != "mixed_float16":
        return optimizer
    with setup.strategy.scope():
        scaled = keras.optimizers.LossScaleOptimizer(optimizer)
        scaled.build(optimizer._trainable_variables)
    return scaled


class _Handed(BaseException):  # not an Exception: it passes through the user's step
    pass


def forward(setup: Setup, batch: Batch) -> Forward:
    """Evaluate the loss function that the task's train step gives to `minimize`. Replica context.

    The step runs up to its call of `minimize`, so that no peer has a loss of its own. A `transform` is not seen.
    """

    def stop(loss_fn: Any, batch: Batch, variables: Any, *, penalty: Any, **_: Any) -> None:
        raise _Handed(loss_fn, batch, variables, penalty)

    try:
        with mock.patch.object(gradients, "local_result", stop):
            setup.task.train_step(setup.state, batch)
    except _Handed as handed:
        loss_fn, batch, variables, penalty = handed.args
    else:
        raise UsageError("the task's train step does not call minimize; the peers train tasks that do.")
    result = loss_fn(batch)
    losses, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    total, count = (losses if isinstance(losses, Metric) else mean(losses, batch["weight"])).parts
    if penalty is not None:
        total += tf.cast(penalty(), tf.float32) * count
    if isinstance(losses, Metric):  # replicas need not have equally many tokens
        divisor = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)
    else:  # as tf.nn.compute_average_loss
        divisor = float(setup.config.global_batch_size)
    return Forward(total / divisor, {"loss": Metric((total, count), divide), **extra}, variables)


def look(setup: Setup, dataset: Any) -> Layout:
    """Return the layout of what `forward` returns; its graph is thrown away."""
    found: list[Layout] = []

    def note(batch: Batch) -> None:
        _, metrics, variables = forward(setup, batch)
        parts = [f"{name}_{index}" for name, metric in metrics.items() for index in range(len(metric.parts))]
        found.append(Layout(parts, pack(metrics).shape[0] or 0, variables))

    traced: Any = tf.function(lambda batch: setup.strategy.run(note, args=(batch,)), autograph=False)
    traced.get_concrete_function(dataset.element_spec)
    return found[0]


class Training(NamedTuple):
    """Hold a step for `strategy.run`, and where it adds up the metrics."""

    replica_step: Callable[[Batch], None]
    sums: tf.Variable  # float32 `[size]`, summed over replicas when it is read; the loss's total and count come first


def training(setup: Setup, dataset: Any) -> Training:
    """Return the textbook step: forward, backward, `optimizer.apply`, which reduces, and a sum of the metrics.

    As good as it can be written: metrics stay on their replica until they are read; XLA compiles the whole step where
    there is one device, else forward and backward, since collectives cannot be compiled with them.
    """
    strategy, jit_compile = setup.strategy, setup.config.jit_compile
    optimizer = optimizer_of(setup)
    layout = look(setup, dataset)
    with strategy.scope():
        sums = tf.Variable(
            tf.zeros([layout.size]),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    def local(batch: Batch) -> tuple[Any, tf.Tensor]:
        with tf.GradientTape() as tape:
            found = forward(setup, batch)
            scaled = optimizer.scale_loss(found.share)
        return tape.gradient(scaled, [variable.value for variable in layout.variables]), pack(found.metrics)

    alone = strategy is tf.distribute.get_strategy()

    def replica_step(batch: Batch) -> None:
        # Made anew for each replica, whose own variables it reads.
        compiled = tf.function(local, jit_compile=True, autograph=False) if jit_compile and not alone else local
        found, packed = compiled(batch)
        optimizer.apply(found, layout.variables)
        sums.assign_add(packed)

    whole = tf.function(replica_step, jit_compile=True, autograph=False) if jit_compile and alone else replica_step
    return Training(whole, sums)


def take_mean_loss(sums: tf.Variable) -> float:
    """Return the mean loss since the last call. Waits for the steps; every worker must call it."""
    total, count, *_ = sums.numpy().tolist()
    sums.assign(tf.zeros_like(sums))
    return total / count
