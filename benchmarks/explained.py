"""Say whether the scaling model explains the points: it fits, or is untested by them; saturated, or unexplained.

A model that is fitted to what it does not describe predicts nonsense with confidence; so that is said instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.fitting import TERMS, Fit, Point, Prediction, fit, predict

FITS, UNTESTED, SATURATED, UNEXPLAINED = "fits", "untested", "saturated", "unexplained"
_MEAN_ERROR, _WORST_ERROR = 0.03, 0.12  # of a fit that explains; the worst of a published table that fits is 0.08
# The exposed communication may grow with the compute by the stragglers' part, which is some percent of the compute.
_GROWTH = 0.25
# At a limit the throughput is the same within this, and that far below what smaller sizes tell.
_LEVEL, _BELOW = 0.1, 0.15


@dataclass(frozen=True)
class Explanation:
    """A fit, how far it explains the points, and the limits of throughput where they are saturated."""

    fit: Fit
    status: str  # FITS, UNTESTED, SATURATED, UNEXPLAINED
    reason: str  # a sentence; empty if it fits
    limits: dict[str, float]  # examples a second of all devices, or of each host, by configuration
    of_each_host: bool = False
    larger: tuple[Point, ...] = ()  # that contradict the fit


def explain(points: Sequence[Point], *, optional: Sequence[str] | None = None) -> Explanation:
    """Fit the points (`optional` as in `fit`), and say whether they are explained.

    Untested: nothing can contradict the model, as all points are needed to find its parameters, or as none tells what
    communication costs. Saturated: the model explains the smaller sizes, and from some size on the throughput stays at
    a limit, of the network, the storage or the parameter servers; the model is that of the smaller sizes then.
    """
    found = fit(points, optional=optional)
    worst = int(np.argmax(np.abs(found.errors)))
    grown = _growth(found)
    reason = ""
    if found.mean_error > _MEAN_ERROR or abs(found.errors[worst]) > _WORST_ERROR:
        reason = (
            f"the step times are off by {found.mean_error:.1%} on average and by {abs(found.errors[worst]):.1%} at "
            f"{found.points[worst].devices} devices ({found.points[worst].config})"
        )
    elif grown > _GROWTH:
        reason = f"the exposed time grows with the compute, by {grown:.0%} of it, which communication does not"
    if not reason:
        untested = _untested(found)
        return Explanation(found, UNTESTED if untested else FITS, untested, {})
    return _saturation(points, optional) or Explanation(found, UNEXPLAINED, f"Unexplained: {reason}.", {})


def foretell(known: Explanation, config: str, devices: int, hosts: int, batch: float, size: float) -> Prediction:
    """Predict as `predict` does, no faster than the limits; what is unexplained gets a band that says so.

    That reaches from no more throughput than at the largest size to the throughput in proportion to the devices.
    """
    found = predict(known.fit, config, devices, hosts, batch, size)
    if known.status == UNEXPLAINED:
        measured = [*known.fit.points, *known.larger]
        largest = max((p for p in measured if p.config == config), key=lambda p: p.devices)
        rate = largest.devices * largest.batch / largest.seconds
        shortest, longest = sorted((largest.seconds / largest.batch * batch, devices * batch / rate))
        return Prediction(found.seconds, min(found.low, shortest), max(found.high, longest), UNEXPLAINED)
    if config in known.limits:
        limit = known.limits[config] * (hosts if known.of_each_host else 1)
        if devices * batch / limit > found.seconds:
            widening = found.high / found.seconds * (1 + _LEVEL)
            seconds = devices * batch / limit
            return Prediction(seconds, max(found.low, seconds / widening), seconds * widening, SATURATED)
    return found


def contradicted(known: Explanation, points: Sequence[Point], devices: int) -> Explanation:
    """Return what is known of sizes from `devices` on, whose points are outside of the band that was foretold."""
    if known.status not in (FITS, UNTESTED):
        return known
    whole = explain(points)
    if whole.status == SATURATED:
        return replace(whole, fit=known.fit)
    reason = f"Unexplained: what was measured at {devices} devices is outside of the band."
    return replace(known, status=UNEXPLAINED, reason=reason, larger=tuple(points))


def _untested(found: Fit) -> str:
    """Return a sentence if the points could not contradict the model, else nothing."""
    if found.free and found.freedom:
        return ""
    assumed = ", ".join(TERMS[name].title for name in TERMS if name not in found.free)
    if not found.free:
        return f"Untested: no point tells what communication costs; assumed: {assumed}."
    count = len(found.compute) + len(found.free)
    return (
        f"Untested: {len(found.points)} points find {count} parameters, with none to check them by; assumed: {assumed}."
    )


def _growth(found: Fit) -> float:
    """Return by how much, at least, the exposed time grows with the compute at the largest size that can tell."""
    places: dict[tuple[int, int], list[Point]] = {}
    for point in found.points:
        if point.devices > 1 and point.config is not None and point.size > 0:
            places.setdefault((point.devices, point.hosts), []).append(point)
    for _, points in sorted(places.items(), reverse=True):
        compute = np.array([found.compute[point.config or ""] * point.batch for point in points])
        seconds = np.array([point.seconds for point in points])
        if compute.max() > 1.2 * compute.min():
            slope = np.polyfit(compute, seconds - compute, 1)[0]
            # A step of 1 % more or less, as between two launches, must not count.
            return float(slope - 0.02 * seconds.mean() / (compute.std() * math.sqrt(len(points))))
    return 0.0


def _saturation(points: Sequence[Point], optional: Sequence[str] | None) -> Explanation | None:
    """Return the explanation by a limit that all configurations reach from some size on, if there is one."""
    sizes = sorted({point.devices for point in points if point.config is not None})
    for first in sizes[2:]:
        rest = [point for point in points if point.devices < first]
        beyond = [point for point in points if point.devices >= first and point.config is not None]
        configs = {point.config for point in beyond}
        if not configs <= {point.config for point in rest}:
            continue
        one_host = all(point.hosts == 1 for point in beyond)
        if not one_host and len({point.hosts for point in rest}) < 3:
            continue  # what the first crossing between hosts costs is not told by the rest
        found = fit(rest, optional=optional)
        if found.mean_error > _MEAN_ERROR:
            return None
        limits: dict[str, float] = {}
        for config in configs:
            rates = [point.devices * point.batch / point.seconds for point in beyond if point.config == config]
            limits[config or ""] = math.exp(np.mean(np.log(rates)))
            if max(rates) > min(rates) * (1 + _LEVEL):
                break
        else:
            told = [predict(found, p.config or "", p.devices, p.hosts, p.batch, p.size).seconds for p in beyond]
            if all(p.seconds > seconds * (1 + _BELOW) for p, seconds in zip(beyond, told, strict=True)):
                reason = f"Saturated: from {first} devices on the throughput no longer grows as at smaller sizes."
                return Explanation(found, SATURATED, reason, limits, of_each_host=one_host)
    return None
