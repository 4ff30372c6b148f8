"""Save and restore everything of a run by name, in the background.

`save` takes a copy on the host, which is all that the step waits for; a thread writes it (`checkpoint_files` says how).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import numpy as np
import tensorflow as tf

from distloop import checkpoint_files
from distloop.checkpoint_files import DamagedError, Saved
from distloop.errors import StorageError, UsageError
from distloop.say import say
from distloop.sharding import ShardedSlot
from distloop.storage import Path
from distloop.task import State, named_variables

_SHOWN = 10  # differences of each kind in an error


@final
class Checkpointer:
    """Save and restore `state` under `folder`. Every worker calls `save` and `restore`; only `writes` writes files.

        with Checkpointer(folder, state, writes=True) as checkpointer: ...

    Leaving it waits for the write under way. The newest `keep` checkpoints stay, and the best one. `report` gets a line
    for a person: what failed, what is damaged (default: the writer's go to stderr).
    """

    def __init__(
        self, folder: Path, state: State, *, writes: bool, keep: int = 3, report: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder
        self.writes = writes
        self.keep = keep
        self.variables = named_variables(state)
        self.report = report or (say if writes else _say_nothing)
        self._stale: list[Path] = []  # newer than what was restored, and so not of this course of the run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str | None] | None = None
        self._failure: str | None = None  # of the last write
        self._timings: dict[str, float] = {}

    @property
    def num_bytes(self) -> int:
        """Return about how large a checkpoint is."""
        return sum(v.shape.num_elements() * v.dtype.size for v in self.variables.values())

    def save(self, host_state: Mapping[str, Any], *, best_step: int | None = None) -> None:
        """Save the variables and `host_state` (JSON values) as they are now.

        Waits for a write still under way, copies, and returns. A write that fails is reported, and the checkpoints
        before it stay. `best_step` is one that is kept however old it is.
        """
        if not self.writes:
            for variable in self.variables.values():
                if isinstance(variable, ShardedSlot):
                    variable.numpy()  # the worker that writes asks for this worker's pieces
            return
        began = time.perf_counter()
        self._finish_writing()
        content = json.dumps(host_state)
        values = {name: variable.numpy() for name, variable in self.variables.items()}  # copies
        self._writing = self._thread.submit(self._write, values, content, best_step)
        stall = time.perf_counter() - began
        self._timings["checkpoint_stall_seconds"] = self._timings.get("checkpoint_stall_seconds", 0.0) + stall

    def wait(self) -> None:
        """Wait for the write under way. Raises StorageError if the last write has failed."""
        self._finish_writing()
        if self._failure:
            raise StorageError(
                f"{self._failure}; the checkpoints before it are kept. Make room, and the same command goes on."
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self._finish_writing()  # which has reported what failed; the error that is on its way tells more

    def timings(self) -> dict[str, float]:
        """Return how long saves have stalled the training, and the last write took, since the last call; seconds."""
        timings, self._timings = self._timings, {}
        return timings

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Set the variables to the newest sound checkpoint, or that of `step`; return its host state, None without one.

        A damaged one is reported, and the one before is used. Raises UsageError if all are damaged, if there is none of
        `step`, or, with the names that differ, if the checkpoint is not of this model.
        """
        self._finish_writing()
        folders = checkpoint_files.complete_folders(self.folder)
        if step is not None:
            folders = [path for path in folders if checkpoint_files.step_of(path) == step]
        if step is None and not folders:
            return None
        saved = newest_sound(folders, self.report)
        if saved is None:
            which = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise UsageError(
                f"{self.folder} has no sound {which}; put one back from a copy, or give a new workdir to start over."
            )
        _check_fit(saved, self.variables)
        for name, variable in self.variables.items():
            variable.assign(saved.values[name])
        self._stale = [path for path in folders if checkpoint_files.step_of(path) > saved.step]
        return saved.host_state

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._failure, self._writing = self._writing.result(), None

    def _write(self, values: Mapping[str, np.ndarray], host_state: str, best_step: int | None) -> str | None:
        """Write a checkpoint, on the thread; return what failed."""
        began = time.perf_counter()
        target = checkpoint_files.folder_of(self.folder, int(values["step"]))
        try:
            self._clear(target)
            if _holds(target, values):  # of a run that was resumed here, before any other step
                checkpoint_files.set_host_state(target, host_state)
            else:
                checkpoint_files.remove(target)  # an evaluation that was done again has moved the seeds of its layers
                checkpoint_files.write(target, values, host_state)
        except OSError as error:
            failure = f"the checkpoint {target} could not be written ({_one_line(error)})"
            self.report(f"{failure}; training goes on, and the checkpoints before it are kept.")
            if not (target / checkpoint_files.INDEX).exists():
                self._try_to_remove([target])  # what is there of it takes room
            return failure
        complete = checkpoint_files.complete_folders(self.folder)
        kept = {target.name, *(path.name for path in complete[-self.keep :])}
        if best_step is not None:
            kept.add(checkpoint_files.folder_of(self.folder, best_step).name)
        self._try_to_remove([path for path in complete if path.name not in kept])
        self._timings["checkpoint_write_seconds"] = time.perf_counter() - began
        return None

    def _clear(self, target: Path) -> None:
        """Remove what is incomplete, and what does not belong to this course of the run."""
        complete = checkpoint_files.complete_folders(self.folder)
        for path in checkpoint_files.all_folders(self.folder):
            if path in self._stale or path not in complete:
                checkpoint_files.remove(path)
        self._stale = []

    def _try_to_remove(self, folders: list[Path]) -> None:
        try:
            for path in folders:
                checkpoint_files.remove(path)
        except OSError as error:
            self.report(f"a checkpoint that is no longer needed could not be removed ({_one_line(error)}).")


def _holds(path: Path, values: Mapping[str, np.ndarray]) -> bool:
    """Return whether a sound checkpoint of just these values is there."""
    if not (path / checkpoint_files.INDEX).exists():
        return False
    try:
        saved = checkpoint_files.read(path).values
    except checkpoint_files.DamagedError:
        return False
    return saved.keys() == values.keys() and all(np.array_equal(saved[name], values[name]) for name in values)


def newest_sound(folders: list[Path], report: Callable[[str], None]) -> Saved | None:
    """Return what the last of `folders` (oldest first) holds that is not damaged; report those that are."""
    for path in reversed(folders):
        try:
            return checkpoint_files.read(path)
        except DamagedError as error:
            report(f"the checkpoint {path} is damaged ({error}); trying the one before it.")
    return None


def _check_fit(saved: Saved, variables: Mapping[str, tf.Variable]) -> None:
    """Raise UsageError, with what differs, unless a checkpoint holds exactly these variables."""
    missing = [f"{name} {kind_of(variable)}" for name, variable in variables.items() if name not in saved.values]
    unexpected = [f"{name} {kind_of(value)}" for name, value in saved.values.items() if name not in variables]
    differing = [
        f"{name} {kind_of(saved.values[name])} there, {kind_of(variable)} here"
        for name, variable in variables.items()
        if name in saved.values and kind_of(saved.values[name]) != kind_of(variable)
    ]
    groups = {"missing there": missing, "unexpected there": unexpected, "of another shape or dtype": differing}
    lines = [f"\n  {what} ({len(names)}): {shorten(names)}" for what, names in groups.items() if names]
    if lines:
        raise UsageError(
            f"checkpoint {saved.path} is of another model; give a new workdir, or bring the model back; "
            f"--init_from takes what fits into a new run.{''.join(lines)}"
        )


def kind_of(value: np.ndarray | tf.Variable) -> str:
    """Return a shape and dtype as text: `[3, 4] float32`."""
    return f"{list(value.shape)} {tf.as_dtype(value.dtype).name}"


def shorten(names: Sequence[str]) -> str:
    """Join names, the first ten of them."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")


def _say_nothing(line: str) -> None:
    """Stand in for the report on all workers but the one that writes."""
