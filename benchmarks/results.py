"""From the windows of all workers of all launches to the fields of a result. The slowest worker's time counts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import statistics
from benchmarks.cases import Case
from benchmarks.peaks import Peak

MFU = (
    "FLOPs of an example (2 a multiply-add of the traced step) * examples a second / "
    "(devices * peak FLOPs a second of a device)"
)
_STEADY = 0.05  # the halves of a steady launch differ by no more, relative
_SAME_IN_ALL_LAUNCHES = ("params", "gradient_bytes", "unit", "units_per_example", "flops_per_example")


class Launch(NamedTuple):
    """Hold what the workers of one launch have said: `facts` of its run line, and the window lines of all ranks."""

    id: str
    facts: Mapping[str, Any]
    windows: Sequence[Mapping[str, Any]]


def summarize(
    case: Case,
    launches: Sequence[Launch],
    *,
    env: str,
    peak: Peak | None = None,
    baseline: Mapping[str, Any] | None = None,
    breakdown: Mapping[str, float | None] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Return the fields of a result line; null where nothing was measured.

    `env` is the hash of the env line, `peak` that of one device, `baseline` the result line that efficiency
    is relative to, `breakdown` the milliseconds of a step's parts, `error` why launches failed. Raises ValueError for
    launches that cannot be of this case.
    """
    facts = _common_facts(launches)
    windows = {launch.id: step_ms(case, launch) for launch in launches if launch.windows}
    step = statistics.interval(list(windows.values())) if windows else None
    throughput = step and _throughput(step, case.global_batch * facts["units_per_example"])
    return {
        "key": case.key,
        "case": case.to_dict(),
        "env": env,
        "launches": [launch.id for launch in launches],
        "global_batch": case.global_batch,
        **{name: facts.get(name) for name in ("params", "gradient_bytes", "unit", "units_per_example")},
        "throughput": throughput and throughput.to_dict(),
        "per_device": throughput and throughput.median / case.total_replicas,
        "step_ms": step and _distribution(step, np.concatenate(list(windows.values()))),
        "breakdown_ms": breakdown and dict(breakdown),
        "efficiency": _efficiency(case, throughput, baseline) if throughput and baseline else None,
        "flops": _flops(case, step, facts["flops_per_example"], peak) if step else None,
        "memory": _medians([launch.facts["memory"] for launch in launches]),
        "startup_s": _medians([launch.facts["startup_s"] for launch in launches]),
        "skew_ms": _skew_ms(case, launches) if step and case.workers > 1 else None,
        "losses": facts.get("losses", []),
        "warnings": _warnings(launches, windows),
        "error": error,
    }


def step_ms(case: Case, launch: Launch) -> list[float]:
    """Return the milliseconds a step in each window of a launch, those of the slowest worker."""
    return _by_rank(case, launch, "seconds").max(axis=0).tolist()


def part_ms(case: Case, launches: Sequence[Launch], part: str) -> float | None:
    """Return the milliseconds a step of `input_wait_s` or `host_gap_s` of the windows, or None if it was not measured.

    Of a part that each worker measures for itself, those of the one with most, for whom the others wait; the input wait
    is a mean over all replicas already. Then medians, as for the step.
    """
    if any(window[part] is None for launch in launches for window in launch.windows):
        return None
    return statistics.interval([_by_rank(case, launch, part).max(axis=0).tolist() for launch in launches]).median


def _by_rank(case: Case, launch: Launch, part: str) -> np.ndarray:
    """Return milliseconds a step, float64 [workers, windows]; a window that not every worker has ended is left out."""
    found: dict[int, dict[int, float]] = {rank: {} for rank in range(case.workers)}
    for window in launch.windows:
        if window["rank"] not in found:
            raise ValueError(f"launch {launch.id} has a window of rank {window['rank']}; the case has {case.workers}.")
        found[window["rank"]][window["index"]] = 1e3 * window[part] / window["steps"]
    indices = sorted(set.intersection(*map(set, found.values())))
    if not indices:
        raise ValueError(f"launch {launch.id} has no window of all {case.workers} workers.")
    return np.array([[values[index] for index in indices] for values in found.values()])


def _common_facts(launches: Sequence[Launch]) -> Mapping[str, Any]:
    """Return the facts of the first launch; what is of the case must be the same in all."""
    facts = launches[0].facts if launches else {}
    for launch in launches:
        for name in _SAME_IN_ALL_LAUNCHES:
            if launch.facts[name] != facts[name]:
                raise ValueError(
                    f"launch {launch.id} has {name} {launch.facts[name]}, launch {launches[0].id} {facts[name]}; "
                    "launches of one case agree."
                )
    return facts


def _throughput(step: statistics.Interval, units: float) -> statistics.Interval:
    """Return units a second, of steps in milliseconds of so many units."""
    rate = 1e3 * units
    return statistics.Interval(
        rate / step.median, rate / step.high, rate / step.low, tuple(rate / launch for launch in step.launches)
    )


def _distribution(step: statistics.Interval, windows: np.ndarray) -> dict[str, float]:
    """Return the fields of `step_ms`; all but the interval are of the windows of all launches together."""
    p5, p50, p95, p99 = np.percentile(windows, [5, 50, 95, 99]).tolist()
    mean = float(windows.mean())
    return {
        **{"median": step.median, "low": step.low, "high": step.high},
        **{"p5": p5, "p50": p50, "p95": p95, "p99": p99, "mean": mean},
        **{"mad": statistics.jitter(windows), "cv": float(windows.std()) / mean},
    }


def _efficiency(case: Case, throughput: statistics.Interval, baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the throughput relative to that of as many baselines; None if the baseline has none."""
    if baseline["throughput"] is None:
        return None
    base = baseline["case"]
    bases = case.total_replicas / (base["workers"] * base["replicas"])
    return {
        "value": throughput.median / (baseline["throughput"]["median"] * bases),
        "baseline": baseline["key"],
        "kind": "weak" if case.per_replica_batch == base["per_replica_batch"] else "strong",
    }


def _flops(
    case: Case, step: statistics.Interval, per_example: float | None, peak: Peak | None
) -> dict[str, Any] | None:
    if per_example is None:
        return None
    per_second = per_example * case.global_batch / (step.median / 1e3)
    return {
        "per_example": per_example,
        "formula": MFU,
        "mfu": per_second / (case.total_replicas * peak.flops_per_second) if peak else None,
        "peak": peak and peak.flops_per_second,
        "peak_source": peak and peak.source,
    }


def _medians(facts: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Return the median over launches of each value; None where a launch has none."""
    if not facts:
        return None
    columns = {name: [launch[name] for launch in facts] for name in facts[0]}
    return {name: None if None in values else float(np.median(values)) for name, values in columns.items()}


def _skew_ms(case: Case, launches: Sequence[Launch]) -> dict[str, float]:
    """Return how much slower one worker always is, and how much is lost because now this, now that one is slow."""
    parts = []
    for launch in launches:
        times = _by_rank(case, launch, "seconds")
        slowest = times.mean(axis=1).max()
        parts.append((slowest - times.mean(), times.max(axis=0).mean() - slowest))
    persistent, jitter = np.median(parts, axis=0).tolist()
    return {"persistent": persistent, "jitter": jitter}


def _warnings(launches: Sequence[Launch], windows: Mapping[str, Sequence[float]]) -> list[str]:
    found = [warning for launch in launches for warning in launch.facts["warnings"]]
    if 0 < len(windows) < statistics.ENOUGH_LAUNCHES:
        found.append(
            f"only {len(windows)} launches: the interval is too narrow; {statistics.ENOUGH_LAUNCHES} give a 95 % one"
        )
    for name, steps in windows.items():
        half = len(steps) // 2
        change = np.median(steps[half:]) / np.median(steps[:half]) - 1 if half else 0.0
        if abs(change) > _STEADY:
            found.append(f"launch {name} is unsteady: its second half is {change:+.0%} in step time")
    return list(dict.fromkeys(found))
