"""Start a run from the weights of another one: what fits by name and shape is taken, and the rest is told."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

from distloop import checkpoint_files, storage
from distloop.checkpoint import kind_of, newest_sound, shorten
from distloop.checkpoint_files import Saved
from distloop.errors import UsageError
from distloop.storage import Path
from distloop.task import State, named_variables


@dataclass(frozen=True)
class Loaded:
    """Say what was taken from a checkpoint and what was not, by the names of variables."""

    checkpoint: str
    step: int
    averages: bool  # whether the weights are the other run's moving averages
    loaded: list[str]
    only_here: list[str]  # keep the values that the task's build gave them
    other_kind: list[str]  # of another shape or dtype: keep theirs too
    not_taken: list[str]  # there only, or no weight: slots, seeds, step

    @property
    def identity(self) -> str:
        """Return what is the same on all workers if they have loaded the same."""
        return f"{self.step} from {self.checkpoint.rpartition('/')[2]}, {len(self.loaded)} variables"

    def text(self) -> str:
        """Return what a person should know, in a line or two."""
        what = "averages of the weights" if self.averages else "weights (that run kept no averages)"
        text = f"init_from {self.checkpoint}: {len(self.loaded)} variables loaded, {what}; list in init_from.json"
        missed = [*self.other_kind, *(f"{name} (new)" for name in self.only_here)]
        return text + (f"\n  not loaded: {shorten(missed)}" if missed else "")

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self)


def load_weights(source: str, state: State, *, report: Callable[[str], None]) -> Loaded:
    """Set the weights of `state`'s models from a workdir or a checkpoint's folder; every worker calls it.

    Taken are variables of models (weights and statistics, no seeds), moving averages if the other run has them. The
    averages of this run start from what was taken. Raises UsageError if there is no sound checkpoint or nothing fits.
    """
    saved = newest_sound(_folders(source), report)
    if saved is None:
        raise UsageError(
            f"init_from is {source}, but there is no sound checkpoint; expected a workdir or a checkpoint."
        )
    weights = _weights(state)
    averages = _averages(saved)
    values = {name: _value(saved, averages, name) for name in weights if name in saved.values}
    fits = [name for name, value in values.items() if kind_of(value) == kind_of(weights[name])]
    if not fits:
        theirs = shorten([name for name in saved.values if not name.startswith("average/")])
        raise UsageError(
            f"init_from is {source}, but nothing in it has the name and the shape of a weight here; name models and "
            f"layers as that run did.\n  here: {shorten(list(weights))}\n  there: {theirs}"
        )
    for name in fits:
        weights[name].assign(values[name])
    for variable, average in state.averages.values():
        average.assign(variable.value)
    return Loaded(
        checkpoint=str(saved.path),
        step=saved.step,
        averages=any(_path(name) in averages for name in fits),
        loaded=fits,
        only_here=[name for name in weights if name not in saved.values],
        other_kind=[
            f"{name} ({kind_of(value)} there, {kind_of(weights[name])} here)"
            for name, value in values.items()
            if name not in fits
        ],
        not_taken=[name for name in saved.values if name not in fits and not name.startswith("average/")],
    )


def _folders(source: str) -> list[Path]:
    folder = storage.as_path(source)
    if (folder / checkpoint_files.INDEX).exists():
        return [folder]
    return checkpoint_files.complete_folders(folder / "checkpoints") or checkpoint_files.complete_folders(folder)


def _weights(state: State) -> dict[str, Any]:
    models = tuple(f"{name}/" for name, part in state.parts.items() if isinstance(part, keras.Layer))
    return {
        name: variable
        for name, variable in named_variables(state).items()
        if name.startswith(models) and not name.endswith("seed_generator_state")
    }


def _averages(saved: Saved) -> dict[str, np.ndarray]:
    """Return the averages by the path of their variable, `average/<optimizer>/<path>`; none that two could mean."""
    names = [name for name in saved.values if name.startswith("average/")]
    paths = [name.split("/", 2)[2] for name in names]
    return {path: saved.values[name] for name, path in zip(names, paths, strict=True) if paths.count(path) == 1}


def _value(saved: Saved, averages: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return averages.get(_path(name), saved.values[name])


def _path(name: str) -> str:
    return name.partition("/")[2]
