"""The folder of a run: whose it is, whether it is finished, and writing small files whole. Imports no TensorFlow."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from distloop import storage
from distloop.config import RunConfig, shaping_differences
from distloop.errors import UsageError
from distloop.storage import Path


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never a part."""
    storage.write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return `values` with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read_json(path: Path) -> Any | None:
    """Return the value in `path`, or None if there is no such file. Raises UsageError if it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON ({error}); restore it, or give a new workdir.") from error


def check(config: RunConfig) -> Path:
    """Return the workdir's path; writes nothing. Raises UsageError if it cannot be this run's."""
    if not config.workdir:
        raise UsageError("workdir is not given; expected a folder for this run, such as --workdir=runs/first.")
    workdir = storage.as_path(config.workdir)
    if not storage.is_remote(workdir):
        _check_local(workdir)
    saved = read_json(workdir / "config.json")
    if saved is None:
        foreign = [name for name in _FILES if (workdir / name).exists()]
        if foreign:
            raise UsageError(f"workdir {workdir} holds {foreign[0]} but no config.json; give a new folder.")
        return workdir
    differences = shaping_differences(config, saved)
    if differences:
        raise UsageError(
            f"workdir {workdir} holds another run ({'; '.join(differences)}); "
            "give a new workdir, or that run's settings to go on with it."
        )
    return workdir


def config_of(workdir: str, **given: Any) -> RunConfig:
    """Return the settings of the run in `workdir`, those `given` in their place.

    What does not shape the result, such as the number of replicas, is as if it were not set. Raises UsageError if there
    is no run.
    """
    saved = read_json(storage.as_path(workdir) / "config.json")
    if saved is None:
        raise UsageError(f"workdir {workdir} has no config.json; expected the folder of a run.")
    shaping = {setting.name for setting in fields(RunConfig) if setting.metadata["shapes_result"]}
    settings: dict[str, Any] = {name: value for name, value in saved.items() if name in shaping}
    return RunConfig(**settings | given, workdir=workdir)


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with any of the JSON values that a run is made of."""
    text = json.dumps(made_of, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_local(workdir: Path) -> None:
    nearest = next(path for path in (workdir, *workdir.resolve().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UsageError(
            f"workdir {workdir}: {nearest} {what}; give a folder of yours, new, empty or of this same run."
        )


def prepare(workdir: Path, config: Mapping[str, Any], *, checkpoint_bytes: int) -> None:
    """Make the folder and write `config` to `config.json`, the first write of a run. Raises UsageError without room.

    `checkpoint_bytes` is the size of one checkpoint.
    """
    try:
        with storage.os_errors():
            workdir.mkdir(parents=True, exist_ok=True)
        free = storage.free_bytes(workdir)
        if free is not None and free < checkpoint_bytes:
            raise UsageError(
                f"workdir {workdir} has {free / 1e6:.1f} MB left, but one checkpoint takes "
                f"{checkpoint_bytes / 1e6:.1f} MB; free some space, or give another."
            )
        write_json(workdir / "config.json", config)
    except OSError as error:
        raise UsageError(
            f"workdir {workdir} cannot be written to ({error}); free some space, or give another."
        ) from error


_FILES = ("summary.json", "metrics.jsonl", "checkpoints", "train", "eval")  # of a run, beside config.json


def finished_summary(workdir: Path) -> dict[str, Any] | None:
    """Return what `summary.json` holds if the run in `workdir` is finished."""
    return read_json(workdir / "summary.json")
