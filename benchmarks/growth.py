"""How a step's time grows with one number of its configuration: batch, steps a call, weights of the model."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.tables import PEER_NAMES, size_of

Record = Mapping[str, Any]
_LEAST_POINTS = 3


class Growth(NamedTuple):
    """Hold the step times of one workload against one number."""

    workload: str
    mode: str
    number: str  # as a flag or an argument of the task calls it
    fixed: str  # the rest of the configuration, but for defaults
    points: list[tuple[float, Record]]  # the number, and the milliseconds of a step with their interval


def growths(results: Iterable[Record]) -> list[Growth]:
    """Return each series of at least three step times whose cases differ by one number alone."""
    found: dict[tuple[str, str, str, str], dict[float, Record]] = {}
    for result in results:
        case, settings = result["case"], _settings(result["case"])
        for name, value in settings.items() if result["step_ms"] else ():
            rest = [f"{other} {settings[other]}" for other in settings if other != name]
            fixed = ", ".join([PEER_NAMES[case["peer"]], size_of(case), *rest])
            if (number := _number(value)) is not None:
                found.setdefault((case["workload"], case["mode"], name, fixed), {})[number] = result["step_ms"]
    series = [Growth(*key, sorted(points.items())) for key, points in found.items()]
    return [growth for growth in series if len(growth.points) >= _LEAST_POINTS]


def _settings(case: Record) -> dict[str, Any]:
    settings = dict(case["settings"])
    task_args: str = settings.pop("task_args", None) or ""
    arguments = {
        name: value for name, is_one, value in (text.partition("=") for text in task_args.split(",")) if is_one
    }
    return {"batch a replica": case["per_replica_batch"], **settings, **arguments}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
