"""`train(task, config)` and `evaluate(task, config)`: how the parts make a run, from top to bottom."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from distloop import actions, cluster, preflight, runtime, strategies, workdir
from distloop.checkpoint import Checkpointer
from distloop.config import RunConfig, UsageError
from distloop.console import Display
from distloop.data import Stream, describe, make_stream, per_replica_batches
from distloop.finetune import Loaded, load_weights
from distloop.guard import stop_if_not_finite
from distloop.loop import Evaluation, evaluate_once, train_steps
from distloop.steps import CompiledSteps, compile_steps, separate_seeds
from distloop.storage import Path
from distloop.task import Source, State, StepFn, Task, check_layers, load_task
from distloop.tasks import find
from distloop.updates import prepare
from distloop.writers import make_writer


class _Setup(NamedTuple):
    folder: Path
    workers: cluster.Cluster
    strategy_name: str
    strategy: tf.distribute.Strategy
    task: Task
    state: State
    checkpointer: Checkpointer


def train(
    task: Task | str | None, config: RunConfig, *, extra_actions: Sequence[actions.Action] = ()
) -> dict[str, Any]:
    """Train, resume or find finished the run of `config.workdir`; return what its `summary.json` holds.

    `task` is a Task, or the name of one, which is then imported only once the strategy stands. Every worker calls it.
    `extra_actions` are functions of a `Progress` (plain floats, the same on every worker), called after each compiled
    call, once its metrics are written; no collective is in them, so what only one worker does holds up no other.
    Raises UsageError for what the user can mend, before anything is written, and NotFiniteError if the run diverges.
    """
    folder = workdir.check(config)
    workers = cluster.from_tf_config(os.environ.get("TF_CONFIG"))
    chief = workers.is_chief
    display = Display(enabled=chief)
    summary = workdir.finished_summary(folder)
    if summary is not None:
        display.line(f"the run in {folder} is finished at step {summary['steps']}; nothing to do.")
        return summary
    setup = _set_up(task, config, folder, workers)
    host_state, loaded = _restore_or_begin(setup, config)
    actions.resume(extra_actions, host_state["actions"])
    record, start_step = host_state["record"], int(setup.state.step.numpy())
    separate_seeds(setup.strategy, setup.state)
    stream = _stream(setup.task.train_data, config, "train_data", seed=config.seed)
    eval_stream = _eval_stream(setup, config)
    _compare_streams(workers, start_step, loaded, data=stream, evaluation=eval_stream)
    preflight.check_reduction(setup.strategy, workers)
    call = _compile(setup, setup.task.train_step, stream, first_step=start_step, training=True)
    evaluate_now = _evaluator(setup, eval_stream, best_metric=config.best_metric)
    total_steps = config.total_steps(stream.steps_per_epoch)
    eval_every = config.eval_every_steps or stream.steps_per_epoch
    save_every = config.checkpoint_every_steps or stream.steps_per_epoch

    # From here on files are written: everything that can be wrong with the input has been tried.
    if chief:
        workdir.prepare(folder, config, checkpoint_bytes=setup.checkpointer.num_bytes)
    writer = make_writer(folder, after_step=start_step) if chief else _write_nothing
    display.facts(f"distloop {config.task or 'task'}", _facts(setup, config, stream, start_step, total_steps))
    if loaded:
        display.line(loaded.text())
        if chief:
            workdir.write_json(folder / "init_from.json", loaded.to_dict())
    timings = setup.checkpointer.timings
    acts = [actions.write_to(writer, display, record, timings), stop_if_not_finite(setup.state, every=save_every)]
    if evaluate_now is not None:
        acts.append(actions.every(eval_every, actions.evaluate_with(evaluate_now, writer, display, record)))
        if config.best_metric:
            acts.append(actions.every(eval_every, actions.keep_best(record, config.best_metric, mode=config.best_mode)))
            acts.append(stop_if_not_finite(setup.state, every=eval_every))  # the best may be saved there
    acts.extend(extra_actions)
    acts.append(actions.save_to(setup.checkpointer, record, steps=save_every, extra_actions=extra_actions))
    with display, setup.checkpointer:
        for progress in train_steps(
            call,
            stream,
            start_step=start_step,
            total_steps=total_steps,
            stops=(config.steps_per_call, eval_every, save_every),
            open_epoch=host_state["open_epoch"],
        ):
            for act in acts:
                act(progress)

    summary = _summarize(setup, record, total_steps, display)
    _leave_together(setup)
    return summary


def evaluate(task: Task | str | None, config: RunConfig) -> dict[str, float]:
    """Evaluate the newest checkpoint of `config.workdir`; return the means. Every worker calls it; writes nothing."""
    workers = cluster.from_tf_config(os.environ.get("TF_CONFIG"))
    setup = _set_up(task, config, workdir.check(config), workers)
    if setup.checkpointer.restore() is None:
        raise UsageError(f"workdir {setup.folder} has no checkpoint to evaluate; train there first.")
    eval_stream = _eval_stream(setup, config)
    _compare_streams(workers, int(setup.state.step.numpy()), evaluation=eval_stream)
    evaluate_now = _evaluator(setup, eval_stream)
    if evaluate_now is None:
        raise UsageError("the task has no eval_data; give it eval_step and eval_data.")
    metrics = evaluate_now().metrics
    _leave_together(setup)
    return metrics


def _set_up(task: Task | str | None, config: RunConfig, folder: Path, workers: cluster.Cluster) -> _Setup:
    """Make strategy, task, state and checkpointer, in the only order that works; write nothing."""
    if task is not None and not isinstance(task, Task | str):
        raise UsageError(f"task is a {type(task).__name__}; expected a distloop.Task, such as make_task(config).")
    if not isinstance(task, Task):
        find(task)  # an unknown task is told before TensorFlow starts
    runtime.initialize(replicas=config.replicas, seed=config.seed, precision=config.precision)
    strategy_name = strategies.choose(config.strategy, cluster=workers, replicas=config.replicas)
    strategy = strategies.make_strategy(strategy_name, cluster=workers, replicas=config.replicas)
    _check_batch_size(config, strategy.num_replicas_in_sync)
    if strategy_name == "tpu" and config.precision == "mixed_float16":
        raise UsageError("precision is mixed_float16, but TPUs compute in bfloat16; use --precision=mixed_bfloat16.")
    if not isinstance(task, Task):
        # User code comes after the strategy: an operation at import would make collectives impossible.
        task = load_task(task, config)
    # Workers that differ here would wait for each other for ever once they make variables.
    facts = {
        "flags": {**config.to_dict(), "data_dir": None},  # where the data lies is each worker's own matter
        "replicas": strategy.num_replicas_in_sync // workers.num_workers,
        "code": preflight.source_version(task),
    }
    preflight.check_workers(workers, facts)
    with strategy.scope():
        state = task.build()
    if not isinstance(state, State):
        raise UsageError(f"the task's build returned {type(state).__name__}; expected a distloop.State.")
    check_layers(state, replicas=strategy.num_replicas_in_sync, jit_compile=config.jit_compile)
    with strategy.scope():
        prepare(state, config)
    checkpointer = Checkpointer(folder / "checkpoints", state, writes=workers.is_chief, keep=config.keep_checkpoints)
    return _Setup(folder, workers, strategy_name, strategy, task, state, checkpointer)


def _restore_or_begin(setup: _Setup, config: RunConfig) -> tuple[dict[str, Any], Loaded | None]:
    """Return the host state of the newest checkpoint, or a new run's, and what it took from another run."""
    host_state = setup.checkpointer.restore()
    if host_state is not None:
        return host_state, None
    record = {"train": {}, "eval": {}, "eval_count": 0, "examples": 0, "seconds": 0.0, "best": None}
    report = setup.checkpointer.report
    loaded = load_weights(config.init_from, setup.state, report=report) if config.init_from else None
    return {"record": record, "open_epoch": None, "actions": {}}, loaded


def _check_batch_size(config: RunConfig, replicas: int) -> None:
    size, parts = config.global_batch_size, replicas * config.micro_batches
    below = size // parts * parts
    if below != size:
        nearest = f"{below} or {below + parts}" if below else str(parts)
        accumulated = f" times {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
        raise UsageError(
            f"global_batch_size ({size}) must be a multiple of the {replicas} replicas{accumulated}; use {nearest}."
        )


def _stream(source_fn: Callable[[], Source], config: RunConfig, name: str, *, seed: int | None) -> Stream:
    return make_stream(source_fn(), name=name, global_batch_size=config.global_batch_size, seed=seed)


def _compile(setup: _Setup, step_fn: StepFn, stream: Stream, *, first_step: int, training: bool) -> CompiledSteps:
    dataset = setup.strategy.distribute_datasets_from_function(
        lambda context: per_replica_batches(stream, context, first_step=first_step)
    )
    return compile_steps(setup.strategy, step_fn, setup.state, dataset, training=training)


def _eval_stream(setup: _Setup, config: RunConfig) -> Stream | None:
    return setup.task.eval_data and _stream(setup.task.eval_data, config, "eval_data", seed=None)


def _compare_streams(
    workers: cluster.Cluster, start_step: int, loaded: Loaded | None = None, **streams: Stream | None
) -> None:
    """Raise UsageError on every worker if one reads other data, and so makes other steps, or has another checkpoint."""
    facts: dict[str, object] = {name: stream and describe(stream) for name, stream in streams.items()}
    facts |= {"checkpoint": start_step, "init_from": loaded and loaded.identity}
    preflight.check_workers(workers, facts)


def _evaluator(
    setup: _Setup, stream: Stream | None, *, best_metric: str | None = None
) -> Callable[[], Evaluation] | None:
    if setup.task.eval_step is None or stream is None:
        if best_metric:
            raise UsageError(f"best_metric is {best_metric!r}, but the task has no eval_data to find the best with.")
        return None
    call = _compile(setup, setup.task.eval_step, stream, first_step=0, training=False)
    if best_metric:
        actions.check_best_metric(best_metric, call.metrics)
    return lambda: evaluate_once(call, stream)


def _facts(setup: _Setup, config: RunConfig, stream: Stream, start_step: int, total_steps: int) -> dict[str, Any]:
    replicas, workers = setup.strategy.num_replicas_in_sync, setup.workers.num_workers
    return {
        "strategy": setup.strategy_name,
        "replicas": replicas,
        "workers": workers,
        "devices": ", ".join(strategies.local_devices(setup.strategy)) + (" each worker" if workers > 1 else ""),
        "global batch": config.global_batch_size,
        "per-replica batch": config.global_batch_size // replicas,
        "steps an epoch": f"{stream.steps_per_epoch:,} ({stream.num_examples:,} examples)",
        "total steps": f"{total_steps:,}" + (f", resumed after {start_step:,}" if start_step else ""),
        "workdir": setup.folder,
    }


def _summarize(setup: _Setup, record: dict[str, Any], total_steps: int, display: Display) -> dict[str, Any]:
    """Write and show how the run has ended."""
    rate = record["examples"] / record["seconds"]
    finite = {split: workdir.finite(record[split]) for split in ("train", "eval")}
    summary = {**record, **finite, "steps": total_steps, "examples_per_second": rate}
    if setup.workers.is_chief:
        workdir.write_json(setup.folder / "summary.json", summary)
    display.table({"train": record["train"], "test": record["eval"]})
    display.line(f"{rate:,.0f} examples/s over {record['seconds']:.1f} s of training")
    display.line(f"tensorboard --logdir {shlex.quote(str(setup.folder))}")
    return summary


def _write_nothing(step: int, split: str, values: Mapping[str, float]) -> None:
    """Stand in for the writer on all workers but the chief."""


def _leave_together(setup: _Setup) -> None:
    """Wait for all workers: one that ends early makes the others fail (tensorflow#58434)."""
    if setup.workers.num_workers > 1:
        setup.strategy.reduce(tf.distribute.ReduceOp.SUM, tf.constant(0), axis=None)
