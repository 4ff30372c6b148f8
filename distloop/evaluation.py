"""Evaluate checkpoints of a run: one of them, or each as it appears, beside the processes that train."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator

import tensorflow as tf

from distloop import checkpoint_files, cluster, startup, storage, workdir
from distloop.actions import check_best_metric
from distloop.checkpoint import Checkpointer
from distloop.config import RunConfig
from distloop.console import Display, show
from distloop.data import Stream
from distloop.errors import UsageError
from distloop.lifecycle import Lifecycle
from distloop.loop import Evaluation, evaluate_once
from distloop.startup import Setup
from distloop.steps import held
from distloop.storage import Path
from distloop.task import Task
from distloop.writers import make_writer

_LOOK_SECS = 0.5  # how often a follower looks for a new checkpoint


def evaluate(task: Task | str | None, config: RunConfig, *, checkpoint: str | int = "newest") -> dict[str, float]:
    """Evaluate a checkpoint of `config.workdir`: the `newest`, the `best` or that of a step; return the means.

    Every worker calls it; writes nothing. Raises UsageError without such a checkpoint.
    """
    return evaluate_checkpoint(task, config, checkpoint)[1].metrics


def evaluate_checkpoint(
    task: Task | str | None, config: RunConfig, checkpoint: str | int = "newest"
) -> tuple[int, Evaluation]:
    """Evaluate a checkpoint as `evaluate` does; return its step and what was found."""
    with _ready(task, config) as (setup, stop, life):
        restore(setup.checkpointer, checkpoint)
        evaluation = _evaluator_alone(setup, stop, life)()
        life.leave_together()
        return int(setup.state.step.numpy()), evaluation


def follow(task: Task | str | None, config: RunConfig) -> None:
    """Evaluate the checkpoints of `config.workdir` as they appear, until the run is finished and its last one is done.

    In one process, beside the run. Each is evaluated at most once, also by a follower that was started again; those
    that have a newer one beside them are left out. Rows go to `evaluator/metrics.jsonl`, and to event files there. It
    waits for as long as the run takes, also for its beginning.
    """
    folder = storage.as_path(config.workdir or "")
    with _ready(task, config) as (setup, stop, life):
        evaluate_now = _evaluator_alone(setup, stop, life)
        results, display = folder / "evaluator", Display(enabled=True)
        with storage.os_errors():
            results.mkdir(parents=True, exist_ok=True)
        last = _last_step(results / "metrics.jsonl")
        write = make_writer(results, after_step=last)
        for step in _steps_to_evaluate(folder, last, life):
            if _restore_unless_removed(setup.checkpointer, step):
                life.first_step = step
                evaluation = evaluate_now()
                write(step, "eval", evaluation.metrics)
                display.line(f"step {step:<6}{show(evaluation.metrics)}  ({evaluation.counted:,.0f} counted)")
        life.leave_together()


@contextlib.contextmanager
def _ready(task: Task | str | None, config: RunConfig) -> Iterator[tuple[Setup, tf.Variable, Lifecycle]]:
    folder = storage.as_path(config.workdir or "")
    workers = cluster.from_tf_config(os.environ.get("TF_CONFIG"))
    life = Lifecycle(workers, only_reads=True)
    with life.telling():
        cluster.check_own_address(workers)
        strategy = startup.start_strategy(task, config, workers)
        with life.listening() as stop:
            yield startup.set_up(task, config, folder, workers, *strategy), stop, life


def _evaluator_alone(setup: Setup, stop: tf.Variable, life: Lifecycle) -> Callable[[], Evaluation]:
    stream = startup.eval_stream(setup)
    startup.compare_streams(setup, evaluation=stream)
    life.phase = "compile"
    evaluate_now = evaluator(setup, life, stream, stop)
    if evaluate_now is None:
        raise UsageError("the task has no eval_data; give it eval_step and eval_data.")

    def evaluate() -> Evaluation:
        life.phase = "eval"
        evaluation = evaluate_now()
        assert evaluation is not None  # a request to stop ends the process: there is nothing to save
        return evaluation

    return evaluate


def evaluator(
    setup: Setup, life: Lifecycle, stream: Stream | None, stop: tf.Variable, *, best_metric: str | None = None
) -> Callable[[], Evaluation | None] | None:
    """Compile the evaluation of `stream`; return a function that evaluates the variables as they are.

    It returns None if a worker was asked to stop before the end. There is no such function for a task without
    evaluation. Raises UsageError if there will be no `best_metric`.
    """
    if setup.task.eval_step is None or stream is None:
        if best_metric:
            raise UsageError(f"best_metric is {best_metric!r}, but the task has no eval_data to find the best with.")
        return None
    call = startup.compiled(setup, setup.task.eval_step, stream, first_step=0, training=False, stop=stop)
    life.evaluation = call.position
    if best_metric:
        check_best_metric(best_metric, call.metrics)

    def evaluate_now() -> Evaluation | None:
        put_back = held(setup.strategy, setup.state)
        evaluation = evaluate_once(call, stream)
        if evaluation is None:  # stopped, and done again after the resume
            put_back()
        return evaluation

    return evaluate_now


def restore(checkpointer: Checkpointer, checkpoint: str | int) -> None:
    """Set the variables to a checkpoint: the `newest`, the `best` or that of a step. Raises UsageError without it."""
    run = checkpointer.folder.parent
    host_state = checkpointer.restore(checkpoint if isinstance(checkpoint, int) else None)
    if host_state is None:
        raise UsageError(f"workdir {run} has no checkpoint; train there first.")
    if checkpoint == "best":
        best = host_state["record"].get("best")
        if best is None:
            raise UsageError(f"the run in {run} has no best checkpoint; train with --best_metric, or take the newest.")
        checkpointer.restore(best["step"])


def _steps_to_evaluate(folder: Path, last: int, life: Lifecycle) -> Iterator[int]:
    """Yield the step of the newest checkpoint whenever there is a newer one than before, until the run is finished."""
    finished = False
    while not finished:
        finished = workdir.finished_summary(folder) is not None  # looked for first: no checkpoint comes after it
        newest = max(_saved_steps(folder / "checkpoints"), default=0)
        if newest > last:
            last = newest
            yield newest
        elif not finished:
            life.wait_for_news(_LOOK_SECS)


def _saved_steps(checkpoints: Path) -> list[int]:
    return [checkpoint_files.step_of(path) for path in checkpoint_files.complete_folders(checkpoints)]


def _restore_unless_removed(checkpointer: Checkpointer, step: int) -> bool:
    """Restore a checkpoint, which the run may remove meanwhile; return whether it was there."""
    try:
        return checkpointer.restore(step) is not None
    except UsageError:
        if step in _saved_steps(checkpointer.folder):
            raise
        return False


def _last_step(metrics_file: Path) -> int:
    """Return the step of the last whole row, 0 without one."""
    whole = (metrics_file.read_bytes() if metrics_file.exists() else b"").rpartition(b"\n")[0]
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0
