"""What happens between calls. An action is a function of `Progress`; every worker calls each, in the same order.

The order is always write, evaluate, save: a checkpoint then vouches for everything that was logged before it.
"""

from collections.abc import Callable
from typing import Any

from distloop.checkpoint import Checkpointer
from distloop.config import Stopped
from distloop.console import Display, show
from distloop.loop import Evaluation, Progress
from distloop.writers import Writer

Action = Callable[[Progress], None]


def every(steps: int, action: Action) -> Action:
    """Return an action that acts on multiples of `steps` and at the end. `steps` must be one of the loop's stops."""

    def act(progress: Progress) -> None:
        if progress.step % steps == 0 or progress.step == progress.total_steps:
            action(progress)

    return act


def write_to(writer: Writer, display: Display, record: dict[str, Any]) -> Action:
    """Write each call's metrics, show them, and keep the last epoch's in `record`."""

    def act(progress: Progress) -> None:
        rate = progress.examples / progress.seconds
        values = {**progress.metrics, "examples_per_second": rate, "input_wait": progress.input_wait}
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


def save_to(checkpointer: Checkpointer, record: dict[str, Any]) -> Action:
    """Save the state, with `record` and the sums of an open epoch and an open call."""

    def act(progress: Progress) -> None:
        open_call = progress.open_call and progress.open_call._asdict()
        checkpointer.save({"record": record, "open_epoch": progress.open_epoch, "open_call": open_call, "redo": None})

    return act


def save_to_redo(checkpointer: Checkpointer, record: dict[str, Any]) -> Action:
    """Save the state such that a resumed run first does all actions of this `Progress` again."""

    def act(progress: Progress) -> None:
        redo = progress._replace(stopping=False)._asdict()
        checkpointer.save({"record": record, "open_epoch": progress.open_epoch, "open_call": None, "redo": redo})

    return act
