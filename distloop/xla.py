"""Whether XLA pays: `--jit_compile=auto` runs a few steps of either kind at the start, on the run's own batches.

Compiled arithmetic may be faster, but all that XLA compiles ends at once: no gradient leaves before the last is there.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from distloop import preflight, startup
from distloop.data import Stream
from distloop.errors import UsageError
from distloop.startup import Setup
from distloop.steps import CompiledSteps
from distloop.task import check_layers, named_variables
from distloop.updates import rule_of, set_rule

_ROUNDS = 3
_ROUND_SECS = 0.3


def decide(
    setup: Setup, stream: Stream, first_step: int, stop: tf.Variable, *, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Let XLA compile forward and backward if steps are faster so; return what was found, or decided `before`.

    {"jit_compile": True, "off_ms": 4.1, "on_ms": 3.2}: milliseconds a step, the same on every worker. The steps are
    those of the run, from `first_step` on, with reduction and update; then all of the state is put back. Every worker
    calls it, before the steps are traced for good.
    """
    if before is not None:
        _set(setup, before["jit_compile"])
        return before
    put_back = _held(setup)
    local = setup._replace(config=replace(setup.config, data_service=None))  # which hands out each batch once
    calls = {}
    try:
        check_layers(setup.state, replicas=setup.strategy.num_replicas_in_sync, jit_compile=True)
        for on in (False, True):
            _set(setup, on)
            step = setup.task.train_step
            calls[on] = startup.compiled(local, step, stream, first_step=first_step, training=True, stop=stop)
            calls[on](1)  # XLA compiles when it runs
        seconds = _measure(setup, calls)
        found = {"off_ms": 1000 * seconds[False], "on_ms": 1000 * seconds[True]}
    except UsageError as error:  # replicas exchange something within the loss function: told before anything runs
        seconds, found = {False: 0.0, True: 1.0}, {"reason": str(error)}
    put_back()
    jit_compile = seconds[True] < seconds[False]
    _set(setup, jit_compile)
    return {"jit_compile": jit_compile, **found}


def text(decision: dict[str, Any]) -> str:
    """Return a decision as one line for people."""
    chosen = "on" if decision["jit_compile"] else "off"
    figures = "{on_ms:.3g} ms a step with XLA, {off_ms:.3g} without".format_map
    return f"jit_compile: auto chose {chosen}: {decision.get('reason') or figures(decision)}"


def _measure(setup: Setup, calls: dict[bool, CompiledSteps]) -> dict[bool, float]:
    """Return the seconds a step of each kind, in turn, medians of a few rounds; on all workers those of the first."""

    def seconds(call: CompiledSteps, steps: int) -> float:
        began = time.perf_counter()
        call(steps)
        return (time.perf_counter() - began) / steps

    def of_the_first(values: list[float]) -> list[float]:
        return json.loads(preflight.from_all_workers(setup.workers, json.dumps(values))[0])

    steps = [
        max(1, round(_ROUND_SECS / value)) for value in of_the_first([seconds(call, 1) for call in calls.values()])
    ]
    rounds = [[seconds(call, n) for call, n in zip(calls.values(), steps, strict=True)] for _ in range(_ROUNDS)]
    medians = of_the_first([statistics.median(column) for column in zip(*rounds, strict=True)])
    return dict(zip(calls, medians, strict=True))


def _set(setup: Setup, jit_compile: bool) -> None:
    for part in setup.state.parts.values():
        if isinstance(part, keras.optimizers.Optimizer):
            set_rule(part, replace(rule_of(part), jit_compile=jit_compile))


def _held(setup: Setup) -> Callable[[], None]:
    """Return a function that puts back all of the state: on every replica its own, as seeds differ."""
    variables = named_variables(setup.state).values()
    local: list[tf.Variable] = [v for one in variables for v in setup.strategy.experimental_local_results(one)]
    values = [variable.numpy() for variable in local]

    def put_back() -> None:
        for variable, value in zip(local, values, strict=True):
            variable.assign(value)

    return put_back
