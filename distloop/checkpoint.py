"""Save and restore everything of a run by name: `checkpoints/step_00000400/` in TensorFlow's own file format.

A folder is complete or it is not there: files are written and synced under another name, then renamed.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import tensorflow as tf

from distloop.config import UsageError
from distloop.task import State, named_variables
from distloop.workdir import write_json

KEEP = 3  # newest checkpoints


@final
class Checkpointer:
    """Save and restore `state` under `folder`. Every worker calls `save` and `restore`; only `writes` writes files."""

    def __init__(self, folder: Path, state: State, *, writes: bool) -> None:
        self.folder = folder
        self.writes = writes
        self.variables = named_variables(state)

    def save(self, host_state: dict[str, Any]) -> None:
        """Write the variables and `host_state` (JSON values) as they are now; keep the newest `KEEP` checkpoints."""
        if not self.writes:
            return
        values = {name: variable.numpy() for name, variable in self.variables.items()}
        target = self.folder / f"step_{int(values['step']):08d}"
        if target.exists():
            return
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(partial / "state"),
                tensor_names=list(values),
                shape_and_slices=[""] * len(values),
                tensors=[tf.constant(value) for value in values.values()],
            )
        write_json(partial / "host.json", host_state)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(target)
        _sync(self.folder)
        for old in _complete(self.folder)[:-KEEP]:
            shutil.rmtree(old)

    def restore(self) -> dict[str, Any] | None:
        """Set the variables to the newest checkpoint and return its host state, or None if there is none.

        Raises UsageError, with the first names that differ, if the checkpoint is not of this model.
        """
        complete = _complete(self.folder)
        if not complete:
            return None
        reader = tf.train.load_checkpoint(str(complete[-1] / "state"))
        saved = reader.get_variable_to_shape_map()
        ours = {name: variable.shape.as_list() for name, variable in self.variables.items()}
        if saved != ours:
            differ = sorted(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
            raise UsageError(
                f"checkpoint {complete[-1]} is of another model: {len(differ)} variables differ, first {differ[0]!r} "
                f"({_shape(saved.get(differ[0]))} there, {_shape(ours.get(differ[0]))} here); give a new workdir."
            )
        for name, variable in self.variables.items():
            variable.assign(reader.get_tensor(name))
        return json.loads((complete[-1] / "host.json").read_text())


def _shape(shape: Sequence[int | None] | None) -> str:
    return "missing" if shape is None else f"shape {shape}"


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    complete = (path for path in folder.glob("step_*") if path.suffix != ".partial")
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def _sync(path: Path) -> None:
    """Make a file or a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
