"""`ram://`, TensorFlow's file system in the memory of a process, for tests: etils.epath lists its schemes privately."""

import contextlib

import pytest
from etils.epath import backend, gpath, register


@contextlib.contextmanager
def served():
    """Let paths begin with ram://."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
        patch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
        patch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
        patch.setitem(gpath._PREFIX_TO_BACKEND, "ram", backend.tf_backend)
        patch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
        yield
