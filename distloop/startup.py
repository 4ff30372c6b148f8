"""How a run gets ready: strategy, task, state, streams and compiled steps, in the only order that works."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from distloop import inputs, preflight, runtime, strategies
from distloop.checkpoint import Checkpointer
from distloop.cluster import Cluster
from distloop.config import RunConfig
from distloop.data import Stream, describe, make_stream
from distloop.errors import UsageError
from distloop.finetune import Loaded
from distloop.rehearsal import with_fault
from distloop.service import PROMISE, batches_from_service
from distloop.steps import CompiledSteps, compile_steps
from distloop.storage import Path
from distloop.task import Source, State, StepFn, Task, check_layers, load_task
from distloop.tasks import find
from distloop.updates import prepare


class Setup(NamedTuple):
    """Hold what a run consists of before its first step."""

    config: RunConfig
    folder: Path
    workers: Cluster
    strategy_name: str
    strategy: tf.distribute.Strategy
    task: Task
    state: State
    checkpointer: Checkpointer
    code: str  # versions and checksums


def start_strategy(task: Task | str | None, config: RunConfig, workers: Cluster) -> tuple[str, tf.distribute.Strategy]:
    """Start the devices and make the strategy; return its name and itself. Waits until every worker has started."""
    if task is not None and not isinstance(task, Task | str):
        raise UsageError(f"task is a {type(task).__name__}; expected a distloop.Task, such as make_task(config).")
    if not isinstance(task, Task):
        find(task)  # an unknown task is told before TensorFlow starts
    runtime.initialize(
        replicas=config.replicas, seed=config.seed, precision=config.precision, deterministic=config.deterministic
    )
    strategy_name = strategies.choose(config.strategy, cluster=workers, replicas=config.replicas)
    strategy = strategies.make_strategy(strategy_name, cluster=workers, replicas=config.replicas)
    _check_batch_size(config, strategy.num_replicas_in_sync)
    if strategy_name == "tpu" and config.precision == "mixed_float16":
        raise UsageError("precision is mixed_float16, but TPUs compute in bfloat16; use --precision=mixed_bfloat16.")
    return strategy_name, strategy


def set_up(
    task: Task | str | None,
    config: RunConfig,
    folder: Path,
    workers: Cluster,
    strategy_name: str,
    strategy: tf.distribute.Strategy,
) -> Setup:
    """Make task, state and checkpointer; write nothing. Raises UsageError for what the user can mend."""
    if not isinstance(task, Task):
        # User code comes after the strategy: an operation at import would make collectives impossible.
        task = load_task(task, config)
    code = preflight.source_version(task)
    # Workers that differ here would wait for each other for ever once they make variables.
    facts = {
        "flags": {**config.to_dict(), "data_dir": None},  # where the data lies is each worker's own matter
        "replicas": strategy.num_replicas_in_sync // workers.num_workers,
        "code": code,
    }
    preflight.check_workers(workers, facts)
    task = with_fault(task, str(folder))
    with strategy.scope():
        state = task.build()
    if not isinstance(state, State):
        raise UsageError(f"the task's build returned {type(state).__name__}; expected a distloop.State.")
    check_layers(state, replicas=strategy.num_replicas_in_sync, jit_compile=config.jit_compile is True)
    with strategy.scope():
        prepare(state, config)
    checkpointer = Checkpointer(folder / "checkpoints", state, writes=workers.is_chief, keep=config.keep_checkpoints)
    return Setup(config, folder, workers, strategy_name, strategy, task, state, checkpointer, code)


def _check_batch_size(config: RunConfig, replicas: int) -> None:
    size, parts = config.global_batch_size, replicas * config.micro_batches
    below = size // parts * parts
    if below != size:
        nearest = f"{below} or {below + parts}" if below else str(parts)
        accumulated = f" times {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
        raise UsageError(
            f"global_batch_size ({size}) must be a multiple of the {replicas} replicas{accumulated}; use {nearest}."
        )


def train_stream(setup: Setup) -> Stream:
    """Return the stream of training examples, shuffled by the run's seed."""
    return _stream(setup, setup.task.train_data, "train_data", seed=setup.config.seed)


def eval_stream(setup: Setup) -> Stream | None:
    """Return the stream of the evaluation's examples in their own order, if the task has any."""
    return setup.task.eval_data and _stream(setup, setup.task.eval_data, "eval_data", seed=None)


def _stream(setup: Setup, source_fn: Callable[[], Source], name: str, *, seed: int | None) -> Stream:
    return make_stream(source_fn(), name=name, global_batch_size=setup.config.global_batch_size, seed=seed)


def compare_streams(setup: Setup, loaded: Loaded | None = None, **streams: Stream | None) -> dict[str, Any]:
    """Return descriptions of the streams by name.

    Raises UsageError on every worker if one reads other data, and so makes other steps, or begins elsewhere: from
    another checkpoint, or with other weights of another run.
    """
    facts: dict[str, Any] = {name: stream and describe(stream) for name, stream in streams.items()}
    begin = {"checkpoint": int(setup.state.step.numpy()), "init_from": loaded and loaded.identity}
    preflight.check_workers(setup.workers, {**facts, **begin})
    return facts


def compiled(
    setup: Setup, step_fn: StepFn, stream: Stream, *, first_step: int, training: bool, stop: tf.Variable
) -> CompiledSteps:
    """Trace the steps over `stream` from `first_step` on; see `compile_steps`. Evaluations need no data service."""
    service = setup.config.data_service if training else None
    if service is None:
        dataset = inputs.distributed(setup.strategy, stream, first_step=first_step)
    else:
        dataset = setup.strategy.distribute_datasets_from_function(
            lambda context: batches_from_service(stream, context, address=service, first_step=first_step)
        )
    return compile_steps(setup.strategy, step_fn, setup.state, dataset, training=training, stop=stop)


def facts_for_people(setup: Setup, stream: Stream, start_step: int, total_steps: int) -> dict[str, Any]:
    """Return what a person is told at the start."""
    replicas, workers = setup.strategy.num_replicas_in_sync, setup.workers.num_workers
    return {
        "strategy": setup.strategy_name,
        "replicas": replicas,
        "workers": workers,
        "devices": ", ".join(strategies.local_devices(setup.strategy)) + (" each worker" if workers > 1 else ""),
        "global batch": setup.config.global_batch_size,
        "per-replica batch": setup.config.global_batch_size // replicas,
        "steps an epoch": f"{stream.steps_per_epoch:,} ({stream.num_examples:,} examples)",
        "total steps": f"{total_steps:,}" + (f", resumed after {start_step:,}" if start_step else ""),
        **({"data service": f"{setup.config.data_service} {PROMISE}"} if setup.config.data_service else {}),
        "workdir": setup.folder,
    }
