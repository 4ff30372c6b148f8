"""Compiled steps: `steps_per_call` steps in one call, traced once; sums stay on the device until the call ends."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled  # what enables it is public, this is not

from distloop import metrics as metrics_lib
from distloop.errors import UsageError
from distloop.inputs import next_batch, untuned
from distloop.metrics import Metric
from distloop.pipeline import explain
from distloop.position import Position
from distloop.scopes import StepScope
from distloop.task import Batch, State, StepFn, named_variables

COUNTED = "counted"  # the metric that every evaluation has beside the user's: the sum of the weights


class CallResult(NamedTuple):
    """Hold what a call found, the same on every worker."""

    steps: int  # fewer than asked for if a worker was asked to stop: all have stopped after this one
    sums: np.ndarray  # float64 `[size]`: the metrics' parts, packed, summed over steps and replicas
    gathered: np.ndarray  # float64 `[steps * global_batch, width]`: the gathered metrics' parts, packed
    first_bad_step: int  # index in the call of the first step with a sum that is not finite, else -1
    input_wait_secs: float  # in which replicas had nothing to do but wait for batches, their mean; NaN: not measured
    stopping: bool  # whether a worker has been asked to stop


@dataclass(frozen=True)
class CompiledSteps:
    """Run a step many times in one call. `metrics` say what its sums mean."""

    metrics: Mapping[str, Metric]
    position: Position
    traced: Any  # the concrete function of a call: one loop, whose body is a step of all local replicas
    _call: Any
    _fetch: Any
    _iterator: Iterator[Any]
    _ahead: list[Any] = field(default_factory=list)  # the batch of the next step, once a call has returned it

    def __call__(self, num_steps: int) -> CallResult:
        """Run `num_steps` steps. Every worker must make the same calls. Waits for the result (device sync)."""
        try:
            ahead = self._ahead.pop() if self._ahead else self._fetch(self._iterator)
            *found, ahead = self._call(self._iterator, ahead, tf.constant(num_steps))
        except tf.errors.InvalidArgumentError as error:
            too_long = explain(error)
            if too_long:
                raise too_long from error
            cause = re.search(r"\w+Error: .*did not match the expected structure.*", str(error))
            if cause is None:
                raise
            raise UsageError(
                f"the data stopped with {cause[0].rstrip('.')}; every example must have the structure and the shapes "
                "of the first."
            ) from error
        self._ahead.append(ahead)
        steps, sums, gathered, first_bad_step, riders = found
        rows, examples, width = gathered.shape
        stopped, waited = riders.numpy().tolist()
        return CallResult(
            steps=int(steps.numpy()),
            sums=sums.numpy(),
            gathered=gathered.numpy().reshape([rows * examples, width]),
            first_bad_step=int(first_bad_step.numpy()),
            input_wait_secs=waited,
            stopping=stopped > 0,
        )


def compile_steps(
    strategy: tf.distribute.Strategy,
    step_fn: StepFn,
    state: State,
    dataset: Any,
    *,
    training: bool,
    stop: tf.Variable,
) -> CompiledSteps:
    """Trace `step_fn(state, batch)` over a distributed, endless `dataset`; `training` advances `state.step`.

    An evaluation uses the averages of the weights, if there are any. `stop` is a float32 scalar of this worker, above 0
    once it was asked to stop; each step reads it and adds it to its reduction, so that all workers leave the call after
    the same step. Cross-replica context. Raises what the user's step raises, as it is, before anything runs.
    """
    with untuned():
        iterator = iter(dataset)
    metrics: dict[str, Metric] = {}
    position = Position(strategy)

    replica_step = partial(_replica_step, step_fn, state, metrics, position, training=training)

    def fetch(iterator: Iterator[Any]) -> Any:
        began = _now()
        with tf.control_dependencies([began]):
            batch, here = _next(strategy, iterator, position)
        return batch, tf.cast(_now(after=[here]) - began, tf.float32)

    def call(iterator: Iterator[Any], ahead: Any, num_steps: tf.Tensor) -> Any:
        def one_step(
            index: tf.Tensor, ahead: Any, sums: tf.Tensor, rows: tf.TensorArray, first_bad: tf.Tensor, total: tf.Tensor
        ) -> Any:
            batch, waited = tf.nest.pack_sequence_as(first, ahead, expand_composites=True)
            # While this step is computed; TensorFlow begins no step before all of the one before it has ended.
            following, here = _next(strategy, iterator, position)
            results = strategy.run(replica_step, args=(batch, tf.stack([stop.read_value(), waited])))
            if training:
                state.step.assign_add(1)
            # Every replica holds the same; the first local one needs no communication.
            packed, gathered, riders = [strategy.experimental_local_results(result)[0] for result in results]
            ended = _now(after=[position.mark_step(after=[packed, gathered, riders])])
            # TensorFlow looks at the clock in the order of these lines.
            following_waited = tf.cast(_now(after=[here]) - ended, tf.float32)
            is_bad = tf.logical_not(tf.reduce_all(tf.math.is_finite(packed)))
            first_bad = tf.where((first_bad < 0) & is_bad, index, first_bad)
            # float64, so that counts stay exact however long the call is.
            sums = sums + tf.cast(packed, tf.float64)
            ahead = tf.nest.flatten((following, following_waited), expand_composites=True)
            return index + 1, ahead, sums, rows.write(index, gathered), first_bad, total + riders / replicas

        first, replicas = ahead, strategy.num_replicas_in_sync
        ahead, rows = tf.nest.flatten(ahead, expand_composites=True), tf.TensorArray(tf.float64, size=num_steps)
        start = (tf.constant(0), ahead, tf.constant(0.0, tf.float64), rows, tf.constant(-1), tf.zeros([2]))
        # The length of the sums is known once the step is traced: they start as a scalar 0.
        scalar, unknown = tf.TensorShape([]), tf.TensorShape(None)  # pyright: ignore[reportArgumentType] (stub)
        shapes = (scalar, [part.shape for part in ahead], unknown, unknown, scalar, tf.TensorShape([2]))
        steps, ahead, sums, rows, first_bad, riders = tf.while_loop(
            lambda index, _, __, ___, ____, total: (index < num_steps) & (total[0] <= 0), one_step, start, shapes
        )
        ahead = tf.nest.pack_sequence_as(first, ahead, expand_composites=True)
        return steps, sums, rows.gather(tf.range(steps)), first_bad, riders, ahead

    # Without AutoGraph, a user's error keeps its type and points at the user's line. This costs `if tensor:` in a step.
    compiled: Any = tf.function(call, autograph=False)
    fetched: Any = tf.function(fetch, autograph=False)
    ahead = tf.nest.map_structure(tf.type_spec_from_value, fetched.get_concrete_function(iterator).structured_outputs)
    traced = compiled.get_concrete_function(iterator, ahead, tf.TensorSpec([], tf.int32))
    return CompiledSteps(metrics, position, traced, compiled, fetched, iterator)


def _replica_step(
    step_fn: StepFn,
    state: State,
    metrics: dict[str, Metric],
    position: Position,
    batch: Batch,
    riders: tf.Tensor,
    *,
    training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the packed sums, the gathered parts and the riders of one step; `metrics` gets what they mean."""
    # Within the scope a step reads the averages in place of the weights, if it evaluates.
    averages = [] if training else list(state.averages.values())
    scope = StepScope(averages, riders=riders, mark_part=position.mark_part)
    with tf.variable_creator_scope(_refuse_variable), scope:
        found = _call_user(step_fn, state, batch)
    found = _check_training(found) if training else {**found, COUNTED: _count(batch)}
    metrics.update(found)
    if scope.reduced_riders is None:
        position.mark_part([part for metric in found.values() for part in metric.parts])
    summed = {name: metric for name, metric in found.items() if not metric.gathered}
    packed, riders = metrics_lib.reduce_and_pack(summed, riders, scope.reduced_riders)
    return packed, metrics_lib.pack_gathered(found), riders


def separate_seeds(strategy: tf.distribute.Strategy, state: State) -> None:
    """Give each replica seeds of its own, so that dropout masks differ. Cross-replica context, after a restore.

    Keras starts all replicas with the same seed. A checkpoint holds the seeds of the first replica, which are those
    that Keras chose, so that a run repeats and resumes on any number of replicas.
    """
    seeds = [v for name, v in named_variables(state).items() if name.endswith("seed_generator_state")]

    def separate() -> None:
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
        for seed in seeds:
            # Layers have random seeds below 1e9; a prime keeps one layer on one replica from meeting another's.
            seed.assign_add(tf.cast(tf.stack([replica * 1_000_000_007, 0]), seed.dtype))

    if seeds:
        tf.function(lambda: strategy.run(separate), autograph=False)()


def held(strategy: tf.distribute.Strategy, state: State) -> Callable[[], None]:
    """Return a function that puts back what an evaluation may write: seeds, and variables that the user made.

    For an evaluation that will be done again. Cross-replica context; seeds differ from replica to replica.
    """
    own = {name for name, part in state.parts.items() if isinstance(part, tf.Variable | keras.Variable)}
    written = [v for name, v in named_variables(state).items() if name in own or name.endswith("seed_generator_state")]
    values = [(local, local.numpy()) for v in written for local in strategy.experimental_local_results(v)]

    def put_back() -> None:
        for local, value in values:
            local.assign(value)

    return put_back


def _next(strategy: tf.distribute.Strategy, iterator: Iterator[Any], position: Position) -> tuple[Batch, tf.Operation]:
    """Return the next batch of each local replica, and what runs once it has come."""
    batch = next_batch(strategy, iterator)
    return batch, position.mark_batch(after=tf.nest.flatten(batch, expand_composites=True))


def _now(after: Sequence[tf.Operation] = ()) -> tf.Tensor:
    """Return the time, float64 seconds; NaN with `--deterministic`, under which TensorFlow refuses the clock."""
    with tf.control_dependencies(after):
        return tf.constant(np.nan, tf.float64) if is_op_determinism_enabled() else tf.timestamp()


def _check_training(metrics: dict[str, Metric]) -> dict[str, Metric]:
    for name, metric in metrics.items():
        if metric.gathered:
            raise UsageError(f"the train step returned {name!r} made by gather; gather belongs in the eval step.")
    return metrics


def _count(batch: Batch) -> Metric:
    return Metric((tf.reduce_sum(batch["weight"]),), float)


def _call_user(step_fn: StepFn, state: State, batch: Batch) -> dict[str, Metric]:
    """Call the user's step in replica context; say in one sentence what TensorFlow says in many."""
    if isinstance(step_fn, tf.types.experimental.PolymorphicFunction):
        raise UsageError("the step is a tf.function; give the plain function: distloop compiles it.")
    # Keras would put the arguments of a layer's call into the text of every error from within.
    was_filtering = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        return metrics_lib.check(step_fn(state, batch))
    except (RuntimeError, ValueError) as error:
        if "create a variable while in a stateless scope" in str(error):
            _refuse_variable(None)
        if "defining a new graph" in str(error):
            raise UsageError(
                "minimize or another exchange between replicas stands in a branch, a loop or a tf.function within the "
                "step; call it from the step itself, and put tf.cond inside of the loss function."
            ) from error
        if "replica context" not in str(error):
            raise
        raise UsageError(
            f"the step called a function of tf.distribute that belongs outside of it ({error}); distloop runs the "
            "step on every replica itself: return mean(...) or use minimize instead of strategy.run or reduce."
        ) from error
    finally:
        if was_filtering:
            keras.config.enable_traceback_filtering()


def _refuse_variable(_: Any, **settings: Any) -> Any:
    raise UsageError(
        f"the step creates the variable {settings.get('name') or 'without a name'!r}; make layers, optimizers, seed "
        "generators and variables in the task's build function and give them to State."
    )
