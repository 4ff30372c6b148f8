"""From a mode of `benchmarks.run` to the cases that it measures."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from distloop.config import RunConfig
from distloop.errors import UsageError

NAMES = ("step", "h2d", "input", "comm", "nocomm", "e2e", "sweep", "peers", "ablate", "startup")
SPLIT = ("step", "h2d", "e2e")  # modes of cases of which it is told where the time goes


@dataclass(frozen=True)
class Wanted:
    """Say what is measured of one configuration: the case, those that split its step, and what it is relative to."""

    case: Case
    without: Mapping[str, Case] = field(default_factory=dict)  # by their mode
    baseline: Case | None = None

    @property
    def all(self) -> list[Case]:
        """Return the cases to launch."""
        return [self.case, *self.without.values()]


def plan(
    mode: str,
    workload: str,
    *,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    settings: Mapping[str, Any],
    strong: bool = False,
    split: bool = True,
    peers: Sequence[str] = cases.PEERS,
    vary: Mapping[str, Sequence[Any]] | None = None,
    comm_bytes: Sequence[int] = (),
) -> list[Wanted]:
    """Return what a mode measures.

    `sizes` are pairs (workers, replicas in each), `batch` the examples a replica, or of all replicas if scaling is
    `strong`. `vary` are values by setting (ablate), `comm_bytes` sizes beside the workload's own gradients (comm).
    Raises UsageError for what cannot be.
    """
    # Peers read tf.data, and so the batch comes from the host for all of them.
    measured = mode if mode in cases.MODES else "h2d" if mode == "peers" else "step"
    first = Case(workload, measured, settings=dict(settings))
    grid = [_sized(first, size, batch, strong=strong) for size in sizes]
    if mode == "sweep":
        baseline = min(grid, key=lambda case: case.total_replicas)
        return [_wanted(case, split=split, baseline=baseline) for case in grid]
    if mode == "peers":
        return [Wanted(replace(case, peer=peer)) for case in grid for peer in peers]
    if mode == "ablate":
        if not vary:
            raise UsageError("ablate varies nothing; expected --vary such as --vary='jit_compile=0|1'.")
        changes = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
        varied = [
            replace(case, settings=_but_defaults({**case.settings, **change})) for case in grid for change in changes
        ]
        return [_wanted(case, split=False) for case in varied]
    if mode == "comm":
        return [Wanted(case) for case in _exchanges(grid, comm_bytes)]
    return [_wanted(case, split=split and mode in SPLIT) for case in grid]


def unique(wanted: Iterable[Wanted]) -> list[Case]:
    """Return the cases to launch, each once, in order."""
    return list({case.key: case for one in wanted for case in one.all}.values())


def _but_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those that are as they are anyway, so that equal cases have equal keys."""
    defaults = {setting.name: setting.default for setting in fields(RunConfig)}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _sized(case: Case, size: tuple[int, int], batch: int, *, strong: bool) -> Case:
    workers, replicas = size
    total = workers * replicas
    if strong and batch % total:
        raise UsageError(f"a global batch of {batch} cannot be shared by {total} replicas; give a multiple.")
    return replace(case, workers=workers, replicas=replicas, per_replica_batch=batch // total if strong else batch)


def _wanted(case: Case, *, split: bool, baseline: Case | None = None) -> Wanted:
    without = {}
    if split:
        names = ["noupdate"] if case.total_replicas == 1 else ["nocomm", "noupdate"]
        names += [] if case.mode == "step" else ["step"]
        without = {name: replace(case, mode=name) for name in names}
    return Wanted(case, without, None if baseline == case else baseline)


def _exchanges(grid: Sequence[Case], sizes: Sequence[int]) -> list[Case]:
    several = [case for case in grid if case.total_replicas > 1]
    if not several:
        raise UsageError("comm measures what replicas exchange, and there is one; give --replicas or --workers.")
    synthetic = [
        replace(case, workload="null", per_replica_batch=1, settings={"task_args": f"gradient_bytes={size}"})
        for case in several
        for size in sizes
    ]
    return [*several, *synthetic]
