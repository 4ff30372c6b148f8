"""The files of one checkpoint, `step_00000400/`: TensorFlow's own two, `state.*`, and an index, `checkpoint.json`.

The index is written last and vouches for the rest: its own checksum, the other files' sizes, the checksum of
`state.index`, which holds one for every variable. So a folder without an index is incomplete, whatever renames do.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from distloop import storage
from distloop.storage import Path

INDEX = "checkpoint.json"
_FORMAT = 1
# What reading a file raises that is not as it was written; a file that cannot be reached raises other things.
_DAMAGED = (tf.errors.DataLossError, tf.errors.OutOfRangeError, tf.errors.NotFoundError, FileNotFoundError)


class DamagedError(OSError):
    """Report a checkpoint whose index or files are not as they were written."""


@dataclass(frozen=True)
class Saved:
    """Hold what a checkpoint says: values by name, on the host, and the host state (JSON values)."""

    path: Path
    values: Mapping[str, np.ndarray]
    host_state: Any

    @property
    def step(self) -> int:
        """Return the step after which it was saved."""
        return step_of(self.path)


def folder_of(parent: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is or would be."""
    return parent / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def all_folders(parent: Path) -> list[Path]:
    """Return the folders of checkpoints, complete or not, oldest first."""
    with storage.os_errors():
        found = list(parent.iterdir()) if parent.exists() else []
    return sorted((path for path in found if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def complete_folders(parent: Path) -> list[Path]:
    """Return the folders that have an index, oldest first."""
    with storage.os_errors():
        return [path for path in all_folders(parent) if (path / INDEX).exists()]


def write(target: Path, values: Mapping[str, np.ndarray], host_state: str) -> None:
    """Write a checkpoint into the new folder `target`. Raises OSError, and leaves an incomplete folder then.

    `host_state` is JSON text.
    """
    with storage.os_errors():
        target.mkdir(parents=True)
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=str(target / "state"),
                tensor_names=list(values),
                shape_and_slices=[""] * len(values),
                tensors=[tf.constant(value) for value in values.values()],
            )
        files = sorted(target.iterdir())
    for path in [*files, target, target.parent]:
        storage.sync(path)
    _write_index(
        target,
        {
            "format": _FORMAT,
            "step": step_of(target),
            "files": {path.name: storage.size(path) for path in files},
            "state.index": _sha256((target / "state.index").read_bytes()),
            "host_state": json.loads(host_state),
        },
    )


def set_host_state(path: Path, host_state: str) -> None:
    """Give a checkpoint another host state, JSON text. Raises DamagedError and OSError."""
    content = {name: value for name, value in read_index(path).items() if name != "checksum"}
    _write_index(path, {**content, "host_state": json.loads(host_state)})


def _write_index(target: Path, content: dict[str, Any]) -> None:
    index = {"checksum": _sha256(json.dumps(content).encode()), **content}
    storage.write_whole(target / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def remove(path: Path) -> None:
    """Remove a checkpoint, its index first: what a crash leaves of it is incomplete, not damaged."""
    with storage.os_errors():
        (path / INDEX).unlink(missing_ok=True)
    storage.remove(path)


def read_index(path: Path) -> dict[str, Any]:
    """Return the index of a checkpoint. Raises DamagedError unless it and the sizes of the files are as written."""
    try:
        with storage.os_errors():
            index = json.loads((path / INDEX).read_bytes())
            content = {name: value for name, value in index.items() if name != "checksum"}
            if index["checksum"] != _sha256(json.dumps(content).encode()):
                raise DamagedError(f"{INDEX} does not have its checksum")
            for name, expected in index["files"].items():
                if (found := storage.size(path / name)) != expected:
                    raise DamagedError(f"{name} has {found} bytes, not {expected}")
            if _sha256((path / "state.index").read_bytes()) != index["state.index"]:
                raise DamagedError("state.index does not have its checksum")
    except FileNotFoundError as error:
        raise DamagedError(f"a file is missing: {error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{INDEX} is not an index ({error})") from error
    return index


def read(path: Path) -> Saved:
    """Return everything in a checkpoint. Raises DamagedError if any of it is not as it was written."""
    index, prefix = read_index(path), str(path / "state")
    try:
        # The operation, because the reader's own get_tensor says what is wrong in words only, not by type.
        dtypes = tf.compat.v1.train.NewCheckpointReader(prefix).get_variable_to_dtype_map()
        with tf.device("CPU:0"):
            tensors = tf.raw_ops.RestoreV2(
                prefix=prefix,
                tensor_names=list(dtypes),
                shape_and_slices=[""] * len(dtypes),
                dtypes=list(dtypes.values()),
            )
    except _DAMAGED as error:
        raise DamagedError(str(error).partition("\n")[0]) from error
    values = {name: tensor.numpy() for name, tensor in zip(dtypes, tensors, strict=True)}
    return Saved(path, values, index["host_state"])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
