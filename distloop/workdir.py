"""The folder of a run: whose it is, whether it is finished, and writing small files whole. Imports no TensorFlow."""

import json
import os
from pathlib import Path
from typing import Any

from distloop.config import RunConfig, UsageError, shaping_differences


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any | None:
    """Return the value in `path`, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def check(config: RunConfig) -> Path:
    """Return the workdir's path; writes nothing. Raises UsageError if it belongs to another run or is no run's."""
    if not config.workdir:
        raise UsageError("workdir is not given; expected a folder for this run, such as --workdir=runs/first.")
    workdir = Path(config.workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"workdir {workdir} is a file; expected a folder (new, empty or of this same run).")
    saved = read_json(workdir / "config.json")
    if saved is None:
        # A run that was killed while it wrote its first file leaves that file's temporary name.
        if workdir.exists() and any(path.suffix != ".tmp" for path in workdir.iterdir()):
            raise UsageError(f"workdir {workdir} holds files but no run; give an empty or a new folder.")
        return workdir
    differences = shaping_differences(config, saved)
    if differences:
        raise UsageError(
            f"workdir {workdir} holds another run ({'; '.join(differences)}); "
            "give a new workdir, or that run's settings to go on with it."
        )
    return workdir


def finished_summary(workdir: Path) -> dict[str, Any] | None:
    """Return what `summary.json` holds if the run in `workdir` is finished."""
    return read_json(workdir / "summary.json")
