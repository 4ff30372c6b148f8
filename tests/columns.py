"""The columns of every equivalence test: the strategies that must give the numbers of one device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tests import harness


class Column(NamedTuple):
    """How many processes, and the settings of each."""

    workers: int
    settings: dict[str, Any]


REFERENCE = "one device"
COLUMNS = {
    "one device": Column(1, dict(strategy="one_device")),
    "mirrored 2": Column(1, dict(strategy="mirrored", replicas=2)),
    "mirrored 4": Column(1, dict(strategy="mirrored", replicas=4)),
    "two processes": Column(2, dict(strategy="multiworker")),
    "two processes of two replicas": Column(2, dict(strategy="multiworker", replicas=2)),
}


def run_processes(column: str, arguments: Sequence[str], *, limit_secs: float = 180) -> None:
    """Run `python <arguments>` in each process of a column, and fail if one fails."""
    workers = COLUMNS[column].workers
    if workers > 1:
        ended = harness.run_workers(arguments, workers=workers, limit_secs=limit_secs)
    else:
        ended = [harness.run(*arguments, limit_secs=limit_secs)]
    for code, out, err in ended:
        assert code == 0, out[-2000:] + err[-6000:]
