"""`train(task, config)`: how the parts make a run, from top to bottom."""

import copy
import itertools
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from distloop import actions, cluster, preflight, startup, workdir, xla
from distloop.config import RunConfig, shaping_settings
from distloop.console import Display
from distloop.errors import Stopped
from distloop.evaluation import evaluator
from distloop.finetune import Loaded, load_weights
from distloop.guard import stop_if_not_finite
from distloop.lifecycle import Lifecycle
from distloop.loop import OpenCall, Progress, train_steps
from distloop.startup import Setup
from distloop.steps import separate_seeds
from distloop.task import Task, named_variables
from distloop.writers import make_writer


def train(
    task: Task | str | None, config: RunConfig, *, extra_actions: Sequence[actions.Action] = ()
) -> dict[str, Any]:
    """Train, resume or find finished the run of `config.workdir`; return what its `summary.json` holds.

    `task` is a Task, or the name of one, which is then imported only once the strategy stands. Every worker calls it.
    `extra_actions` are functions of a `Progress` (plain floats, the same on every worker), called after each compiled
    call, once its metrics are written; no collective is in them, so what only one worker does holds up no other.
    Raises UsageError for what the user can mend, before anything is written; NotFiniteError if the run diverges;
    Stopped after a SIGTERM or SIGINT, with a checkpoint of the step after which all workers have stopped.
    """
    folder = workdir.check(config)
    workers = cluster.from_tf_config(os.environ.get("TF_CONFIG"))
    display = Display(enabled=workers.is_chief)
    summary = workdir.finished_summary(folder)
    if summary is not None:
        display.line(f"the run in {folder} is finished at step {summary['steps']}; nothing to do.")
        return summary
    life = Lifecycle(workers)
    with life.telling(), life.recording_errors(folder):
        cluster.check_own_address(workers)
        strategy = startup.start_strategy(task, config, workers)
        with life.listening() as stop:
            setup = startup.set_up(task, config, folder, workers, *strategy)
            summary = _train(setup, life, stop, display, extra_actions)
            life.leave_together()
    return summary


def _train(
    setup: Setup, life: Lifecycle, stop: tf.Variable, display: Display, extra_actions: Sequence[actions.Action]
) -> dict[str, Any]:
    config = setup.config
    host_state, loaded = _restore_or_begin(setup)
    actions.resume(extra_actions, host_state["actions"])
    record, start_step = host_state["record"], int(setup.state.step.numpy())
    separate_seeds(setup.strategy, setup.state)
    stream, eval_stream = startup.train_stream(setup), startup.eval_stream(setup)
    data_facts = startup.compare_streams(setup, loaded, data=stream, evaluation=eval_stream)
    preflight.check_reduction(setup.strategy, setup.workers)
    life.first_step = start_step  # before the phase, which is told at once: the supervisor counts attempts by it
    life.phase = "compile"
    if config.jit_compile == "auto":
        # A resumed run goes on to the same bits only as it began.
        record["xla"] = xla.decide(setup, stream, start_step, stop, before=record.get("xla"))
        display.line(xla.text(record["xla"]))
    call = startup.compiled(setup, setup.task.train_step, stream, first_step=start_step, training=True, stop=stop)
    life.training = call.position
    evaluate_now = evaluator(setup, life, eval_stream, stop, best_metric=config.best_metric)
    total_steps = config.total_steps(stream.steps_per_epoch)
    eval_every = config.eval_every_steps or stream.steps_per_epoch
    save_every = config.checkpoint_every_steps or stream.steps_per_epoch

    # From here on files are written: everything that can be wrong with the input has been tried.
    display.facts(f"distloop {config.task or 'task'}", startup.facts_for_people(setup, stream, start_step, total_steps))
    _write_config(setup, data_facts, loaded, display)
    redo = [] if host_state["redo"] is None else [Progress(**host_state["redo"])]
    is_chief = setup.workers.is_chief
    writer = make_writer(setup.folder, after_step=start_step - len(redo)) if is_chief else _write_nothing
    timings = setup.checkpointer.timings
    acts = [actions.write_to(writer, display, record, timings), stop_if_not_finite(setup.state, every=save_every)]
    if evaluate_now is not None:
        evaluation = actions.evaluate_with(evaluate_now, writer, display, record)
        acts.append(actions.every(eval_every, life.in_phase("eval", evaluation)))
        if config.best_metric:
            acts.append(actions.every(eval_every, actions.keep_best(record, config.best_metric, mode=config.best_mode)))
            acts.append(stop_if_not_finite(setup.state, every=eval_every))  # the best may be saved there
    acts.extend(life.in_phase("action", action) for action in extra_actions)
    save = actions.save_to(setup.checkpointer, record, steps=save_every, extra_actions=extra_actions)
    acts.append(life.in_phase("save", save))
    steps = train_steps(
        call,
        stream,
        start_step=start_step,
        total_steps=total_steps,
        stops=(config.steps_per_call, eval_every, save_every),
        open_epoch=host_state["open_epoch"],
        open_call=None if host_state["open_call"] is None else OpenCall(**host_state["open_call"]),
    )
    life.phase = "step"
    with display, setup.checkpointer:
        for progress in itertools.chain(redo, steps):
            before = copy.deepcopy(record)
            if progress.open_call is None:
                try:
                    for act in acts:
                        act(progress)
                except Stopped:  # in an evaluation
                    _stop(setup, life, progress, before, extra_actions, redo=True)
            if progress.stopping and progress.step < total_steps:
                _stop(setup, life, progress, record, extra_actions)
        life.phase = "save"  # the last write
    return _summarize(setup, record, total_steps, display)


def _restore_or_begin(setup: Setup) -> tuple[dict[str, Any], Loaded | None]:
    """Return the host state of the newest checkpoint, or a new run's, and what it took from another run."""
    host_state = setup.checkpointer.restore()
    if host_state is not None:
        return host_state, None
    source, report = setup.config.init_from, setup.checkpointer.report
    loaded = load_weights(source, setup.state, report=report) if source else None
    record = {"train": {}, "eval": {}, "eval_count": 0, "examples": 0, "seconds": 0.0, "best": None}
    return {"record": record, "open_epoch": None, "open_call": None, "redo": None, "actions": {}}, loaded


def _stop(
    setup: Setup,
    life: Lifecycle,
    progress: Progress,
    record: dict[str, Any],
    extra_actions: Sequence[actions.Action],
    *,
    redo: bool = False,
) -> NoReturn:
    """Save, on all workers alike, and raise Stopped."""
    life.phase = "save"
    stop_if_not_finite(setup.state, every=1)(progress)  # no checkpoint may keep a NaN
    actions.save(setup.checkpointer, record, progress, extra_actions=extra_actions, redo=redo)
    setup.checkpointer.wait()
    life.leave_together()
    raise Stopped(
        f"stopped after step {progress.step} of {progress.total_steps}, as asked, with a checkpoint; the same command "
        "goes on from there."
    )


def _write_config(setup: Setup, data_facts: Mapping[str, Any], loaded: Loaded | None, display: Display) -> None:
    """Write `config.json` with what the run is made of; say what has changed since it began. The chief does.

    `init_from.json` says what was taken from another run.
    """
    if not setup.workers.is_chief:
        return
    variables = {name: [v.dtype.name, v.shape.as_list()] for name, v in named_variables(setup.state).items()}
    made_of = {
        "settings": shaping_settings(setup.config),
        "code": setup.code,
        "replicas": setup.strategy.num_replicas_in_sync,
        "variables": workdir.fingerprint(variables),
        **data_facts,
    }
    path = setup.folder / "config.json"
    before = (workdir.read_json(path) or {}).get("made_of", made_of)
    made_of["init_from"] = loaded.identity if loaded else before.get("init_from")
    changed = [name for name in made_of if before.get(name) != made_of[name]]
    if changed:
        display.line(f"resumed with other {' and '.join(changed)} than before: see made_of in {path}.")
    content = {**setup.config.to_dict(), "fingerprint": workdir.fingerprint(made_of), "made_of": made_of}
    workdir.prepare(setup.folder, content, checkpoint_bytes=setup.checkpointer.num_bytes)
    if loaded:
        display.line(loaded.text())
        workdir.write_json(setup.folder / "init_from.json", loaded.to_dict())


def _summarize(setup: Setup, record: dict[str, Any], total_steps: int, display: Display) -> dict[str, Any]:
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
