"""Windows of steps by the clock. Pure functions of what is called and of the clock, so that tests have their own.

A window is some compiled calls; each call ends with one read-back. Windows follow each other without a gap: what lies
between two calls is in a window's time, too.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

_PROBES = 5
_STEADY_WINDOWS, _STEADY = 5, 0.02


class Called(NamedTuple):
    """Hold what one call of some steps was: NaN where it was not measured."""

    seconds: float
    input_wait_secs: float = math.nan  # for how long of it the replicas waited for batches
    loss: float = math.nan  # the mean of its steps


Call = Callable[[int], Called]  # runs that many steps
Train = Callable[[int], float]  # runs that many steps, waits for the devices, and returns the mean loss of the steps


@dataclass(frozen=True)
class Timing:
    """Say how much is measured."""

    windows: int = 40
    window_secs: float = 0.25  # at least
    warmup_secs: float = 20.0  # at most, after the first two calls


class Plan(NamedTuple):
    """Say what a window is."""

    call_steps: int
    calls: int
    step_secs: float
    steady: bool  # the last warm-up windows agreed
    overhead_secs: float | None  # what a call takes beyond its steps; None if the steps are too long to tell


def warm_up(
    call: Call,
    timing: Timing,
    *,
    steps_per_call: int,
    agreed: Callable[[float], float] = lambda value: value,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Call until the windows are steady; return what a window should be.

    Until the last five windows differ by less than 2 %, and at least 10 steps. `agreed` returns the same number on
    every worker, so that all make the same calls.
    """
    for _ in range(2):
        call(1)
    step = agreed(statistics.median(_timed(lambda: call(1), clock) for _ in range(_PROBES)))
    call_steps = max(1, min(steps_per_call, math.ceil(timing.window_secs / step)))
    call(call_steps)
    step = agreed(_timed(lambda: call(call_steps), clock)) / call_steps
    calls = max(1, math.ceil(timing.window_secs / (step * call_steps)))
    seconds: list[float] = []
    while True:
        (window,) = windows(call, call_steps=call_steps, calls=calls, count=1, clock=clock)
        seconds.append(agreed(window["seconds"]))
        last = seconds[-_STEADY_WINDOWS:]
        steady = len(last) == _STEADY_WINDOWS and max(last) - min(last) <= _STEADY * statistics.median(last)
        if steady or sum(seconds) >= timing.warmup_secs:
            break
    step = statistics.median(seconds) / calls / call_steps
    return Plan(call_steps, calls, step, steady, _overhead(call, step, agreed))


def windows(
    call: Call, *, call_steps: int, calls: int, count: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, Any]]:
    """Yield what a window line of a record holds, for `count` windows of `calls` calls of `call_steps` steps."""
    began = clock()
    for index in range(count):
        found = [call(call_steps) for _ in range(calls)]
        end = clock()
        waited = sum(called.input_wait_secs for called in found)
        yield {
            "index": index,
            "steps": calls * call_steps,
            "seconds": end - began,
            "input_wait_s": None if math.isnan(waited) else waited,
            "host_gap_s": max(0.0, end - began - sum(called.seconds for called in found)),
        }
        began = end


def _overhead(call: Call, step: float, agreed: Callable[[float], float]) -> float | None:
    """Return what a call costs whatever its length: from calls of one step and of many, T(n) = overhead + n * step."""
    many = 10
    if step * many * _PROBES > 5.0:  # some tenths of a millisecond could not be told from the noise of such steps
        return None
    short = agreed(statistics.median(call(1).seconds for _ in range(2 * _PROBES)))
    long = agreed(statistics.median(call(many).seconds for _ in range(_PROBES)))
    return max(0.0, (many * short - long) / (many - 1))


def _timed(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    function()
    return clock() - began
