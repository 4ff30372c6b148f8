"""A whole training as a user starts it: real data, evaluations, checkpoints and logs, and what each of them takes."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks import facts, flops, leave_out
from benchmarks.cases import Case
from distloop import startup
from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.experiment import train
from distloop.lifecycle import Lifecycle
from distloop.loop import Progress

_PHASES = {"eval": "eval_s", "save": "save_s"}


def measure(case: Case, config: RunConfig, startup_secs: dict[str, float]) -> dict[str, Any]:
    """Train from the first to the last step; return facts and one window, from the end of the first call on.

    The window's `eval_s` and `save_s` are what the loop waited for; its `host_gap_s` is the rest outside of the steps,
    such as logging. The end of the run, with its last checkpoint, belongs to it.
    """
    window: dict[str, Any] = {"index": 0, "steps": 0, "seconds": 0.0, "input_wait_s": 0.0, "eval_s": 0.0, "save_s": 0.0}
    seen: dict[str, float] = {}
    losses: list[float] = []

    def watch(progress: Progress) -> None:
        losses.append(progress.metrics.get("loss", float("nan")))
        if not seen:
            startup_secs["first_call"] = time.perf_counter() - began
            seen.update(begin=time.perf_counter(), step=progress.step, in_calls=0.0)
            window.update(eval_s=0.0, save_s=0.0)
            return
        seen["in_calls"] += progress.seconds
        window["steps"] = progress.step - int(seen["step"])
        waited = math.nan if progress.input_wait is None else progress.input_wait * progress.seconds
        window["input_wait_s"] += waited

    reduced: list[leave_out.Reduced] = []
    began = time.perf_counter()
    with _timed_phases(window), _kept() as kept, leave_out.nothing(reduced):
        train(config.task, config, extra_actions=[watch])
    if not window["steps"]:
        raise UsageError(
            f"the training ends with its first call of {config.steps_per_call} steps, which is not measured; give more "
            "--train_steps or --epochs."
        )
    window["seconds"] = time.perf_counter() - seen["begin"]
    if math.isnan(window["input_wait_s"]):  # not measured
        window["input_wait_s"] = None
    others = seen["in_calls"] + window["eval_s"] + window["save_s"]
    window["host_gap_s"] = max(0.0, window["seconds"] - others)
    return {
        "facts": {
            **facts.of_model(case, kept[0], startup.train_stream(kept[0]), reduced),
            "flops_per_example": flops.per_example(kept[1], case.global_batch // case.workers),
            "startup_s": startup_secs,
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "calls_per_step": 1 / config.steps_per_call,
            "call_overhead_s": None,
            "warnings": [],
        },
        "windows": [window],
    }


@contextlib.contextmanager
def _kept() -> Iterator[list[Any]]:
    """Yield a list that gets what the training is set up with, and its compiled steps."""
    kept: list[Any] = []
    set_up, compiled = startup.set_up, startup.compiled

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        def keeping(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            kept.append(found)
            return found

        return keeping

    with mock.patch.object(startup, "set_up", keep(set_up)), mock.patch.object(startup, "compiled", keep(compiled)):
        yield kept


@contextlib.contextmanager
def _timed_phases(window: dict[str, Any]) -> Iterator[None]:
    """Add to `window` the seconds of the actions that the loop calls in the phases `eval` and `save`."""
    original = Lifecycle.in_phase

    def in_phase(life: Lifecycle, name: str, action: Callable[[Any], None]) -> Callable[[Any], None]:
        act = original(life, name, action)

        def timed(progress: Any) -> None:
            began = time.perf_counter()
            act(progress)
            if name in _PHASES:
                window[_PHASES[name]] += time.perf_counter() - began

        return timed

    with mock.patch.object(Lifecycle, "in_phase", in_phase):
        yield
