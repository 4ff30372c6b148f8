"""Two runs against each other, case by case.

Of each pair of cases the throughput is compared, new / base, from the launches of both: see `statistics.ratio`. A
verdict is `same` if the 95 % interval lies within the tolerance on both sides of 1 (an equivalence test, also where it
does not hold 1 itself), `regressed` or `improved` if it lies wholly beyond, and else `inconclusive`. Among many pairs
chance alone puts one beyond, so these two verdicts are corrected by Holm's method for the number of pairs; that all are
the same is said only if each is, which needs no correction.

How many launches: where launches scatter by 1 % and their windows by 3 %, 10 a side find 98 of 100 equal pairs `same`
at a tolerance of 3 %, 5 a side 67; a slowdown by 10 % is found with 5. Below 3 a side there is no verdict.

The floor of a machine is the smallest tolerance at which equal runs are `same`: the launches of a case, in the order of
their start, are split into two alternating halves that are compared; all of the launches a side reach sqrt(2) closer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cases, environment, records, results, statistics
from benchmarks.cases import Case
from benchmarks.statistics import Launches, Ratio
from distloop.errors import UsageError

FEWEST_LAUNCHES = 3  # a side, for a verdict
_CHANCE = 0.05  # of a false alarm, all pairs together

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Hold by the key of a case its result, and milliseconds a step of the windows of its launches if none failed."""

    results: Mapping[str, Record]
    steps: Mapping[str, Launches]
    environments: Mapping[str, Record]  # by their hash


@dataclass(frozen=True)
class Pair:
    """Hold what two runs say of one case: throughput new / base, and of other quantities the two values."""

    case: Case
    launches: tuple[int, int]
    throughput: tuple[float, float]
    ratio: Ratio
    verdict: str
    floor: float | None
    others: Mapping[str, tuple[float | None, float | None]]


def load(path: str) -> Run:
    """Read a run. Raises UsageError if it has a case twice."""
    found = records.read([Path(path)])
    by_key: dict[str, Record] = {}
    for record in found:
        if record["kind"] == "result":
            if record["key"] in by_key:
                name = cases.from_dict(record["case"]).name
                raise UsageError(f"{path} has two results of {name}; expected one run: give its file.")
            by_key[record["key"]] = record
    environments = {record["hash"]: record for record in found if record["kind"] == "env"}
    return Run(by_key, step_times(found), environments)


def step_times(found: Iterable[Record]) -> dict[str, Launches]:
    """Return by the key of a case milliseconds a step of the windows of its launches, if none failed."""
    windows: dict[str, list[Record]] = {}
    measured: list[Record] = []
    for record in found:
        if record["kind"] == "window":
            windows.setdefault(record["launch"], []).append(record)
        if record["kind"] == "result" and record["throughput"] and not record["error"]:
            measured.append(record)
    times = {}
    for result in measured:
        launches = [results.Launch(launch, {}, windows.get(launch, [])) for launch in result["launches"]]
        case = cases.from_dict(result["case"])
        times[result["key"]] = [results.step_ms(case, launch) for launch in launches if launch.windows]
    return times


def compare(base: Run, new: Run, tolerance: float, *, across: bool = False) -> list[Pair]:
    """Return the cases that both runs have measured; none if all have failed in the new one.

    Raises UsageError if the runs have no case in common, if they were made in different environments, unless `across`,
    and if the tolerance is below the machine's floor where that is known and no pair differs by more.
    """
    keys = [key for key in base.steps if key in new.steps]
    if not keys and not any(key in new.results for key in base.steps):
        raise UsageError("the runs have no case in common that both have measured; compare runs of one command.")
    if not across:
        _check_environments(base, new, keys)
    ratios = [statistics.ratio(new.steps[key], base.steps[key]) for key in keys]  # of times: throughput new / base
    launches = [(len(base.steps[key]), len(new.steps[key])) for key in keys]
    found = verdicts(ratios, [min(counts) for counts in launches], tolerance)
    pairs = [
        Pair(
            cases.from_dict(base.results[key]["case"]),
            counts,
            (base.results[key]["throughput"]["median"], new.results[key]["throughput"]["median"]),
            ratio,
            verdict,
            _mean(floor for run in (base, new) if (floor := floor_of(run.steps[key])) is not None),
            _others(base.results[key], new.results[key]),
        )
        for key, counts, ratio, verdict in zip(keys, launches, ratios, found, strict=True)
    ]
    if not {"regressed", "improved"} & set(found):  # what is found beyond a tolerance is found, however small that is
        check_tolerance(tolerance, machine_floor(pair.floor for pair in pairs))
    return pairs


def check_tolerance(tolerance: float, floor: float | None) -> None:
    """Raise UsageError if equal runs cannot be told to be the same at this tolerance."""
    if floor is not None and tolerance < floor:
        raise UsageError(
            f"tolerance is {tolerance:g}, but equal runs differ by up to {floor:.2%} on this machine; "
            f"give --tolerance={math.ceil(floor * 1000) / 1000:g} or more, or measure more launches."
        )


def unmatched(base: Run, new: Run) -> dict[str, str]:
    """Return the names of the cases that are no pair, each with the reason."""
    found = {}
    for key, result in {**base.results, **new.results}.items():
        name = cases.from_dict(result["case"]).name
        if key not in new.results:
            found[name] = "only in BASE"
        elif key not in base.results:
            found[name] = "only in NEW"
        elif error := base.results[key]["error"]:
            found[name] = f"failed in BASE: {error}"
        elif error := new.results[key]["error"]:
            found[name] = f"failed in NEW: {error}"
    return found


def verdicts(ratios: Sequence[Ratio], launches: Sequence[int], tolerance: float) -> list[str]:
    """Return the verdict of each ratio, made of so many launches a side: see the head of this file."""
    low, high = 1 - tolerance, 1 + tolerance
    chances = statistics.holm([2 * min(ratio.p_below(low), 1 - ratio.p_below(high)) for ratio in ratios])
    found = []
    for ratio, count, chance in zip(ratios, launches, chances, strict=True):
        verdict = "inconclusive"
        if count >= FEWEST_LAUNCHES:
            if low <= ratio.low and ratio.high <= high:
                verdict = "same"
            elif ratio.high < low and chance < _CHANCE:
                verdict = "regressed"
            elif ratio.low > high and chance < _CHANCE:
                verdict = "improved"
        found.append(verdict)
    return found


def against_itself(launches: Launches) -> Ratio | None:
    """Return the ratio of two alternating halves of launches; None if a half has too few for its interval."""
    if len(launches) < 2 * statistics.ENOUGH_LAUNCHES:
        return None
    return statistics.ratio(launches[1::2], launches[0::2])


def floor_of(launches: Launches) -> float | None:
    """Return the smallest tolerance at which a comparison with as many launches a side tells equal runs as the same."""
    ratio = against_itself(launches)
    return ratio and max(1 - ratio.low, ratio.high - 1) / math.sqrt(2)


def machine_floor(floors: Iterable[float | None]) -> float | None:
    """Return the median over cases: a case that scatters more is inconclusive, and does not forbid the others."""
    known = [floor for floor in floors if floor is not None]
    return float(np.median(known)) if known else None


def _mean(floors: Iterable[float]) -> float | None:
    known = [*floors]
    return math.prod(known) ** (1 / len(known)) if known else None


def _check_environments(base: Run, new: Run, keys: Sequence[str]) -> None:
    pairs = {(base.results[key]["env"], new.results[key]["env"]) for key in keys}
    found = {
        fact: None
        for old, now in pairs
        if old != now
        for fact in environment.differences(base.environments[old], new.environments[now])
    }
    if found:
        raise UsageError(f"the runs differ in {'; '.join(found)}; measure both alike, or give --across.")


def _others(base: Record, new: Record) -> dict[str, tuple[float | None, float | None]]:
    """Return, each of base and new: bytes of memory, seconds of start-up, milliseconds of communication and jitter."""

    def of(result: Record) -> dict[str, float | None]:
        memory, startup = result["memory"], result["startup_s"]
        return {
            "memory_bytes": memory.get("device_peak_bytes") or memory.get("host_peak_bytes"),
            "startup_s": sum(startup.values()),
            "comm_exposed_ms": (result["breakdown_ms"] or {}).get("comm_exposed"),
            "jitter_ms": result["step_ms"]["mad"],
        }

    then, now = of(base), of(new)
    return {name: (then[name], now[name]) for name in then}
