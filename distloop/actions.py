"""What happens between calls. An action is a function of `Progress`; every worker calls each, in the same order.

The order is always write, evaluate, save: a checkpoint then vouches for everything that was logged before it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from distloop.checkpoint import Checkpointer
from distloop.console import Display, show
from distloop.errors import Stopped, UsageError
from distloop.loop import Evaluation, Progress
from distloop.steps import COUNTED
from distloop.writers import Writer

Action = Callable[[Progress], None]


def every(steps: int, action: Action) -> Action:
    """Return an action that acts on multiples of `steps` and at the end. `steps` must be one of the loop's stops."""

    def act(progress: Progress) -> None:
        if progress.step % steps == 0 or progress.step == progress.total_steps:
            action(progress)

    return act


def write_to(
    writer: Writer, display: Display, record: dict[str, Any], timings: Callable[[], Mapping[str, float]]
) -> Action:
    """Write each call's metrics and timings, show them, and keep the last epoch's in `record`."""

    def act(progress: Progress) -> None:
        rate = progress.examples / progress.seconds
        values = {**progress.metrics, "examples_per_second": rate, **timings()}
        if progress.input_wait is not None:
            values["input_wait"] = progress.input_wait
        record["examples"] += progress.examples
        record["seconds"] += progress.seconds
        if progress.epoch_metrics is not None:
            record["train"] = progress.epoch_metrics
            values |= {f"epoch_{name}": value for name, value in progress.epoch_metrics.items()}
            display.line(f"epoch {progress.epoch:<4}{show(progress.epoch_metrics)}")
        writer(progress.step, "train", values)
        display.update(
            step=progress.step,
            total_steps=progress.total_steps,
            description=f"epoch {progress.epoch}",
            values=f"{show(progress.metrics)}  {rate:,.0f} examples/s",
        )

    return act


def evaluate_with(
    evaluate: Callable[[], Evaluation | None], writer: Writer, display: Display, record: dict[str, Any]
) -> Action:
    """Evaluate, write and show the metrics, and keep them in `record`. Raises Stopped if it was cut short."""

    def act(progress: Progress) -> None:
        evaluation = evaluate()
        if evaluation is None:
            raise Stopped
        record["eval"], record["eval_count"] = evaluation.metrics, evaluation.counted
        writer(progress.step, "eval", evaluation.metrics)
        display.line(f"eval      {show(evaluation.metrics)}  ({evaluation.counted:,.0f} counted)")

    return act


def keep_best(record: dict[str, Any], metric: str, *, mode: str) -> Action:
    """Note the step and value in `record["best"]` when the evaluation of this step is the best so far.

    It decides on the reduced metrics, which every worker has, and a NaN is never best. Raises UsageError if the
    evaluation has no such metric.
    """
    sign = 1 if mode == "max" else -1

    def act(progress: Progress) -> None:
        if metric not in record["eval"]:
            _refuse_metric(metric, record["eval"])
        value, best = record["eval"][metric], record.get("best")
        if not math.isnan(value) and (best is None or sign * value > sign * best["value"]):
            record["best"] = {"metric": metric, "value": value, "step": progress.step}

    return act


def check_best_metric(metric: str, traced: Mapping[str, Any]) -> None:
    """Raise UsageError if no evaluation that returns the metrics `traced` will have `metric`."""
    # A metric that is an array or a dict becomes several values, name_0 or name_key.
    if not any(metric == name or metric.startswith(f"{name}_") for name in traced):
        _refuse_metric(metric, traced)


def _refuse_metric(metric: str, known: Mapping[str, Any]) -> NoReturn:
    names = ", ".join(name for name in known if name != COUNTED)
    raise UsageError(f"best_metric is {metric!r}; expected a metric of the evaluation: {names}.")


def save_to(
    checkpointer: Checkpointer, record: dict[str, Any], *, steps: int, extra_actions: Sequence[Action] = ()
) -> Action:
    """Save the state every `steps`, at the end and where the evaluation was the best; see `save`."""

    def act(progress: Progress) -> None:
        best_step = (record["best"] or {}).get("step")
        if progress.step % steps == 0 or progress.step in (progress.total_steps, best_step):
            save(checkpointer, record, progress, extra_actions=extra_actions)

    return act


def save(
    checkpointer: Checkpointer,
    record: dict[str, Any],
    progress: Progress,
    *,
    extra_actions: Sequence[Action] = (),
    redo: bool = False,
) -> None:
    """Save the state, with `record`, the sums of an open epoch and an open call, and what the user's actions keep.

    `redo` makes a resumed run do all actions of this `progress` again before anything else.
    """
    host_state = {
        "record": record,
        "open_epoch": progress.open_epoch,
        "open_call": progress.open_call and progress.open_call._asdict(),
        "redo": progress._replace(stopping=False)._asdict() if redo else None,
        "actions": {name: action.host_state for name, action in keeping(extra_actions).items()},
    }
    checkpointer.save(host_state, best_step=(record["best"] or {}).get("step"))


def keeping(actions: Sequence[Any]) -> dict[str, Any]:
    """Return the actions that have a `host_state`, a dict of JSON values, by the name of their function or class.

    Raises UsageError if it is something else.
    """
    named: dict[str, Any] = {}
    for action in actions:
        if not hasattr(action, "host_state"):
            continue
        name = getattr(action, "__qualname__", type(action).__qualname__)
        repeated = sum(one.partition("#")[0] == name for one in named)
        try:
            if not isinstance(action.host_state, dict):
                raise TypeError(f"it is a {type(action.host_state).__name__}")
            json.dumps(action.host_state)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the host_state of the action {name!r} cannot be saved ({error}); expected a dict of JSON values: "
                "numbers, strings, None, lists and dicts of them."
            ) from error
        named[f"{name}#{repeated}" if repeated else name] = action
    return named


def resume(actions: Sequence[Any], saved: Mapping[str, Any]) -> None:
    """Put back what `save_to` has saved of the actions, into the dicts that they hold."""
    for name, action in keeping(actions).items():
        if name in saved:
            action.host_state.clear()
            action.host_state.update(saved[name])
