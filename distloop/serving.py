"""Hand a trained model to programs that know nothing of distloop: a SavedModel, or a `.keras` file."""

import os
import tempfile
from typing import Any

import keras

from distloop import runtime, storage
from distloop.checkpoint import Checkpointer
from distloop.errors import UsageError
from distloop.evaluation import restore
from distloop.say import say
from distloop.storage import Path
from distloop.task import State, Task, load_task
from distloop.updates import prepare
from distloop.workdir import config_of

FORMATS = ("saved_model", "keras")


def export(
    workdir: str,
    output: str,
    *,
    task: Task | None = None,
    format: str = "saved_model",
    best: bool = False,
    averaged: bool = False,
    part: str | None = None,
) -> list[str]:
    """Write the model of the run in `workdir` to `output`, whole or not at all; return the paths of the models.

    In one process, on one device, from a checkpoint of any strategy: the newest, or the `best` one. `averaged` takes
    the moving averages of the weights. Several models are written into the folder `output`, each under its name in
    State; `part` picks one. The task is built from the run's settings; give `task` if the run has no name for it.
    Raises UsageError for what the user can mend.
    """
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    target = storage.as_path(output)
    if target.exists():
        raise UsageError(f"output {output} exists; give a new path.")
    config = config_of(workdir)
    runtime.initialize(replicas=None, seed=config.seed, precision=config.precision)
    state = (task or load_task(config.task, config)).build()
    prepare(state, config)
    checkpointer = Checkpointer(storage.as_path(workdir) / "checkpoints", state, writes=False, report=say)
    restore(checkpointer, "best" if best else "newest")
    if averaged:
        if not state.averages:
            raise UsageError("averaged is asked for, but the run keeps no averages; drop it (see --ema_momentum).")
        for variable, average in state.averages.values():
            variable.assign(average)
    models = _models(state, part)
    suffix = ".keras" if format == "keras" else ""
    alone = len(models) == 1
    if alone and not target.name.endswith(suffix):
        raise UsageError(f"output is {output}; expected a name that ends in .keras for format=keras.")
    _write_whole(target, {"" if alone else f"{name}{suffix}": model for name, model in models.items()}, format)
    return [str(target)] if alone else [str(target / f"{name}{suffix}") for name in models]


def _models(state: State, part: str | None) -> dict[str, Any]:
    models = {name: model for name, model in state.parts.items() if isinstance(model, keras.Model)}
    if part is None and models:
        return models
    if part not in models:
        raise UsageError(f"part is {part!r}; expected a model of the run: {', '.join(models) or 'it has none'}.")
    return {part: models[part]}


def _write_whole(target: Path, models: dict[str, Any], format: str) -> None:
    """Write models below `target` (at `target` itself if their name is empty), so that all is there or nothing."""
    if storage.is_remote(target):
        with tempfile.TemporaryDirectory() as holder:
            _save(Path(holder) / target.name, models, format)
            _upload(Path(holder) / target.name, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        _save(holder / target.name, models, format)
        for path in [*_files(holder), holder]:
            storage.sync(path)
        (holder / target.name).rename(target)
        storage.sync(target.parent)
    finally:
        storage.remove(holder)


def _save(target: Path, models: dict[str, Any], format: str) -> None:
    for name, model in models.items():
        path = target / name if name else target
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if format == "keras":
                model.save(str(path))
            else:
                model.export(str(path), verbose=False)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(f"Keras cannot write {name or 'the model'} as {format}: {error}") from error


def _upload(source: Path, target: Path) -> None:
    """Copy a file or a folder, `saved_model.pb` last: without it a folder is no SavedModel."""
    with storage.os_errors():
        for path in sorted(_files(source), key=lambda path: path.name == "saved_model.pb"):
            copy = target / path.relative_to(source) if path != source else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for entry in sorted(path.iterdir()) for file in _files(entry)]
