"""The generator of progress, and evaluation. Between two values of the generator anything may happen.

for progress in train_steps(call, stream, ...):
    print(progress.step, progress.metrics)
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distloop.data import Stream
from distloop.metrics import not_finite, results
from distloop.steps import COUNTED, CompiledSteps


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
    first_bad_step: int | None = None  # the first step of the call with a metric that is not finite,
    bad_metrics: Sequence[str] = ()  # and which are not


def train_steps(
    call: CompiledSteps,
    stream: Stream,
    *,
    start_step: int,
    total_steps: int,
    stops: Sequence[int],
    open_epoch: list[float] | None = None,
) -> Iterator[Progress]:
    """Train from `start_step` to `total_steps`; yield after each call.

    A call ends at the next multiple of any of `stops` (steps per call, evaluation and checkpoint intervals) and at the
    end of an epoch: the calls of a resumed run are those of an uninterrupted one. `open_epoch` is what the last
    `Progress` before the resume said.
    """
    stops = (*stops, stream.steps_per_epoch)
    epoch_sums = np.asarray(0.0 if open_epoch is None else open_epoch)
    step = start_step
    while step < total_steps:
        next_step = min(total_steps, *((step // stop + 1) * stop for stop in stops))
        began = time.perf_counter()
        result = call(next_step - step)
        seconds = time.perf_counter() - began
        epoch_sums = epoch_sums + result.sums
        ends_epoch = next_step % stream.steps_per_epoch == 0
        yield Progress(
            step=next_step,
            total_steps=total_steps,
            epoch=(next_step - 1) // stream.steps_per_epoch + 1,
            metrics=results(call.metrics, result.sums),
            epoch_metrics=results(call.metrics, epoch_sums) if ends_epoch or next_step == total_steps else None,
            open_epoch=None if ends_epoch else epoch_sums.tolist(),
            examples=stream.examples_before(next_step) - stream.examples_before(step),
            seconds=seconds,
            first_bad_step=step + 1 + result.first_bad_step if result.first_bad_step >= 0 else None,
            bad_metrics=not_finite(call.metrics, result.sums),
        )
        if ends_epoch:
            epoch_sums = np.asarray(0.0)
        step = next_step


class Evaluation(NamedTuple):
    """Say what an evaluation found: means, and the sum of the weights counted (examples, if none is weighted)."""

    metrics: dict[str, float]
    counted: float


def evaluate_once(call: CompiledSteps, stream: Stream) -> Evaluation:
    """Evaluate each example of the set once, padding not counted. Every worker calls it and gets the same floats."""
    result = call(stream.steps_per_epoch)
    metrics = results(call.metrics, result.sums, result.gathered)
    return Evaluation(metrics, metrics.pop(COUNTED))
