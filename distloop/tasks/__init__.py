"""Reference tasks, one file each, and how a name finds a task. Imports no TensorFlow and no task."""

import importlib.util
import pkgutil

from distloop.errors import UsageError

_OWN_TASK = "my_package.my_module:make_task"


def names() -> list[str]:
    """Return the names of the library's own tasks: the files beside this one."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str | None) -> tuple[str, str]:
    """Return the module and the function that `name` means, without importing anything.

    A bare name is a task of the library; `my_package.my_module:make_task` is anybody's. Raises UsageError if there is
    no such task or package; whether the package has the module shows when it is imported.
    """
    expected = f"expected one of {', '.join(names())}, or your own as {_OWN_TASK}"
    if not name:
        raise UsageError(f"task is not given; {expected}.")
    module, colon, function = name.partition(":")
    if not colon:
        if name not in names():
            raise UsageError(f"there is no task {name!r}; {expected}.")
        return f"{__name__}.{name}", "make_task"
    package = module.partition(".")[0]
    if not package or not function or importlib.util.find_spec(package) is None:
        raise UsageError(
            f"there is no module {package!r} for the task {name!r}; expected {_OWN_TASK}, "
            "importable from the current folder or PYTHONPATH."
        )
    return module, function
