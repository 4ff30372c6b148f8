"""Paths of a run, local or remote (`gs://`), through one library: etils.epath over `tf.io.gfile`.

Imports no TensorFlow: the first touch of a remote path does. What fails here is an OSError, also where TensorFlow has
errors of its own.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator

from etils import epath

from distloop.errors import UsageError

Path = epath.Path


def as_path(text: str | os.PathLike[str]) -> Path:
    """Return `text` as a path. Raises UsageError for a scheme that no file system here serves."""
    scheme = str(text).partition("://")[0] if "://" in str(text) else None
    try:
        path = epath.Path(text)
        with os_errors():
            path.exists()
    except (KeyError, NotImplementedError, OSError) as error:
        if scheme is None:
            return epath.Path(text)  # what is wrong with a local path, its use tells better
        reason = "" if isinstance(error, KeyError) else f" ({error})"
        raise UsageError(
            f"{text} cannot be reached{reason}; expected a local path, or a {scheme}:// that this TensorFlow serves: "
            "gs:// is built in, others come with packages such as tensorflow-io."
        ) from error
    return path


def is_remote(path: Path) -> bool:
    """Tell whether `path` is on an object store or another file system of TensorFlow."""
    return "://" in str(path)


def size(path: Path) -> int:
    """Return the length of a file in bytes."""
    if not is_remote(path):
        return os.stat(path).st_size  # noqa: PTH116 (epath's stat looks up the owner's name, who may have none)
    import tensorflow as tf

    with os_errors():
        return tf.io.gfile.stat(str(path)).length


def free_bytes(folder: Path) -> int | None:
    """Return how much a local folder's file system has left; None for a remote one."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, also after a power cut.

    It is written under another name, synced and renamed. An object store's rename is a copy, which shows the file only
    once it is complete, too.
    """
    with os_errors():
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_bytes(data)
            sync(temporary)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk each byte counts
            raise
        temporary.replace(path)
        sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file. An object store has no such thing: the whole file is written again."""
    with os_errors(), path.open("ab") as file:
        file.write(data)


def sync(path: Path) -> None:
    """Make a local file or folder survive a power cut; a remote one does."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove a folder and what is in it; one that is not there is removed."""
    with os_errors(), contextlib.suppress(FileNotFoundError):
        if folder.exists():
            folder.rmtree()


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raise an error of TensorFlow's file systems as an OSError."""
    try:
        yield
    except Exception as error:
        tensorflow = sys.modules.get("tensorflow")  # without it, the error is none of its
        if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
            raise
        not_found = isinstance(error, tensorflow.errors.NotFoundError)
        # Without the names of TensorFlow's operations.
        message = re.sub(r"\{\{.*?\}\} ?| ?\[Op:\w+\]", "", str(error))
        raise (FileNotFoundError if not_found else OSError)(message) from error
