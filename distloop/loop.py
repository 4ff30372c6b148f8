"""The generator of progress, and evaluation. Between two values of the generator anything may happen.

for progress in train_steps(call, stream, ...):
    print(progress.step, progress.metrics)
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distloop.data import Stream
from distloop.metrics import not_finite, results
from distloop.steps import COUNTED, CallResult, CompiledSteps


class OpenCall(NamedTuple):
    """Hold what a call had found when a worker was asked to stop; a checkpoint keeps it, and a resumed run ends it.

    So the logs have the rows of a run that nobody stopped. Plain values, as in `Progress`.
    """

    begin: int  # the step before the call's first
    sums: list[float]
    seconds: float
    input_wait_secs: float
    first_bad_step: int | None


class Progress(NamedTuple):
    """Say what one call did. Plain Python values, the same on every worker, safe to log anywhere."""

    step: int
    total_steps: int
    epoch: int  # the epoch of the call's last step, from 1
    metrics: dict[str, float]  # means over the call
    epoch_metrics: dict[str, float] | None  # means over the epoch, at its end or the run's
    open_epoch: list[float] | None  # sums of an epoch that has not ended; a checkpoint keeps them
    examples: int  # examples in the call, padding not counted
    seconds: float  # time of the call
    input_wait: float | None = None  # share of this time in which the replicas waited for batches, if measured
    first_bad_step: int | None = None  # the first step of the call with a metric that is not finite,
    bad_metrics: Sequence[str] = ()  # and which are not
    stopping: bool = False  # a worker was asked to stop: nothing comes after this,
    open_call: OpenCall | None = None  # and the call ended before its time


def train_steps(
    call: CompiledSteps,
    stream: Stream,
    *,
    start_step: int,
    total_steps: int,
    stops: Sequence[int],
    open_epoch: list[float] | None = None,
    open_call: OpenCall | None = None,
) -> Iterator[Progress]:
    """Train from `start_step` to `total_steps`; yield after each call.

    A call ends at the next multiple of any of `stops` (steps per call, evaluation and checkpoint intervals) and at the
    end of an epoch: the calls of a resumed run are those of an uninterrupted one. `open_epoch` and `open_call` are what
    the last `Progress` before the resume said.
    """
    stops = (*stops, stream.steps_per_epoch)
    epoch_sums = np.asarray(0.0 if open_epoch is None else open_epoch)
    step, stopping = start_step, False
    while step < total_steps and not stopping:
        call_end = min(total_steps, *((step // stop + 1) * stop for stop in stops))
        began = time.perf_counter()
        result = call(call_end - step)
        found = _found(result, open_call or OpenCall(step, [], 0.0, 0.0, None), step, time.perf_counter() - began)
        step += result.steps
        stopping = result.stopping
        open_call = found if step < call_end else None
        ends_epoch = step % stream.steps_per_epoch == 0
        epoch_sums = epoch_sums + result.sums
        sums = np.asarray(found.sums)
        yield Progress(
            step=step,
            total_steps=total_steps,
            epoch=(step - 1) // stream.steps_per_epoch + 1,
            metrics=results(call.metrics, sums),
            epoch_metrics=results(call.metrics, epoch_sums) if ends_epoch or step == total_steps else None,
            open_epoch=None if ends_epoch else epoch_sums.tolist(),
            examples=stream.examples_before(step) - stream.examples_before(found.begin),
            seconds=found.seconds,
            # What the first step of the next call waits for here is counted there, where it may be more than all.
            input_wait=None if math.isnan(found.input_wait_secs) else min(1.0, found.input_wait_secs / found.seconds),
            first_bad_step=found.first_bad_step,
            bad_metrics=not_finite(call.metrics, sums),
            stopping=stopping,
            open_call=open_call,
        )
        if ends_epoch:
            epoch_sums = np.asarray(0.0)


def _found(result: CallResult, before: OpenCall, step: int, seconds: float) -> OpenCall:
    """Return what a call that began at `step` found, with what was found `before` a stop cut it in two."""
    first_bad_step = step + 1 + result.first_bad_step if result.first_bad_step >= 0 else None
    return OpenCall(
        before.begin,
        (np.asarray(before.sums or 0.0) + result.sums).tolist(),
        before.seconds + seconds,
        before.input_wait_secs + result.input_wait_secs,
        first_bad_step if before.first_bad_step is None else before.first_bad_step,
    )


class Evaluation(NamedTuple):
    """Say what an evaluation found: means, and the sum of the weights counted (examples, if none is weighted)."""

    metrics: dict[str, float]
    counted: float


def evaluate_once(call: CompiledSteps, stream: Stream) -> Evaluation | None:
    """Evaluate each example of the set once, padding not counted. Every worker calls it and gets the same floats.

    Returns None if a worker was asked to stop before the last step.
    """
    result = call(stream.steps_per_epoch)
    if result.steps < stream.steps_per_epoch:
        return None
    metrics = results(call.metrics, result.sums, result.gathered)
    return Evaluation(metrics, metrics.pop(COUNTED))
