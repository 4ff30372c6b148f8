"""Tasks of the library, one file each, and what a name and --task_args mean. Imports no TensorFlow and no task."""

import ast
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from distloop.errors import UsageError

_OWN_TASK = "my_package.my_module:make_task"


def names() -> list[str]:
    """Return the names of the library's own tasks: the files beside this one, but for what they share."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


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


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return what `--task_args` says, by name: `layers=2,pool=mean` gives {"layers": 2, "pool": "mean"}.

    A value is a Python literal, else a word; commas part the arguments and cannot stand in a value.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and value and name.isidentifier()):
            raise UsageError(f"task_args has {part!r}; expected name=value,name=value, such as layers=2,width=64.")
        if name in found:
            raise UsageError(f"task_args gives {name!r} twice; give each argument once.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def arguments_for(make_task: Callable[..., Any], text: str | None) -> dict[str, Any]:
    """Return what `--task_args` says for `make_task(config, ...)`.

    Raises UsageError for what it does not take: another name, or a value unlike the default in type.
    """
    found = parse_arguments(text)
    if not found:
        return {}
    _, *parameters = inspect.signature(make_task).parameters.values()
    defaults = {one.name: one.default for one in parameters}
    for name, value in found.items():
        if name not in defaults or not _fits(value, defaults[name]):
            taken = ", ".join(f"{name}={default!r}" for name, default in defaults.items()) or "no arguments"
            raise UsageError(f"task_args has {name}={value!r}, but the task takes {taken}.")
    return found


def _fits(value: Any, default: Any) -> bool:
    either = default is None or default is inspect.Parameter.empty
    return either or type(value) is type(default) or (type(default) is float and type(value) is int)
