"""Fit the scaling model to measured points, by relative error; tell what they do not explain.

Parameters that the points cannot tell apart are fixed, and every prediction has a band with the assumption that
contributes the most to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from benchmarks import scaling


class Point(NamedTuple):
    """One measured step: of a configuration, or of a communication alone (`config` None), or without any (0 bytes)."""

    config: str | None
    devices: int
    hosts: int
    batch: float  # examples a replica
    size: float  # bytes of gradients
    seconds: float


class Term(NamedTuple):
    """A parameter that all configurations share."""

    title: str
    unit: float  # the parameter, in these, is of the order of one
    assumed: float  # where no point has it
    spread: float  # standard deviation of what is assumed
    highest: float


# In the order in which they are let in; a term stays out where it adds nothing to the rank of those before.
ALWAYS = {
    # Effective rates of published tables: between hosts 1 to 10 GB/s, in a host about 10 GB/s (TensorFlow on V100).
    "across": Term("inter-host bandwidth", 1e-9, 0.2, 0.2, math.inf),
    "inside": Term("intra-host bandwidth", 1e-9, 0.1, 0.1, math.inf),
    "start": Term("start-up cost", 1e-3, 0.0, 0.1, math.inf),
}
OPTIONAL = {
    # A message of NCCL's ring between hosts (its tuning.cc): 14 us.
    "hop": Term("cost of a hop between hosts", 1e-3, 0.014, 0.03, math.inf),
    # The backward pass, beside which communication can run, is two thirds of a step.
    "overlap": Term("zero overlap", 0.1, 0.0, 1.0, 6.7),
    # A relative deviation of workers of 1 %: launches of one published configuration vary by 0.2 to 1.5 %.
    "straggler": Term("stragglers", 0.01, 0.0, 1.0, 5.0),
}
TERMS = ALWAYS | OPTIONAL
_ASKED = ("hop", "overlap")  # let in where the points ask for it; stragglers look too much like other costs
_HOSTS_FOR_HOP = 3  # numbers of hosts beyond 1, to tell its growth from the 2 (n - 1) / n of the bandwidth
_NOTHING = 1e-6  # of the unit of a term: the search comes as near to its bound, 0
_EVIDENCE = 2  # the least difference of Schwarz's criterion that counts ("positive": Kass and Raftery 1995)
_LEAST_COMPUTE = 1e-3  # of the shortest step: some is left where points contradict each other
_WIDEST = math.log(1000)  # of a band; more says no more
_FLOOR = 0.005  # no table is more exact: what is left below is not worth another term
# What is known of the noise before any point: 2 %, as sure as two points would make it.
_NOISE, _NOISE_WEIGHT = 0.02, 2
_DOUBLING = 0.03  # deviation that a doubling beyond the largest point adds; of published tables 9 in 10 are within


@dataclass(frozen=True)
class Fit:
    """What the points say: seconds of compute an example, the terms in units of TERMS, and how sure that is."""

    compute: dict[str, float]
    terms: dict[str, float]
    free: tuple[str, ...]  # terms found from the points; the others are fixed
    covariance: np.ndarray  # of the compute of each configuration, then of each of TERMS
    noise: float  # standard deviation of a relative error
    freedom: int  # points beyond what the parameters take: with 0, none are left to check them by
    points: tuple[Point, ...]
    errors: tuple[float, ...]  # of each point: predicted / measured step time - 1

    @property
    def mean_error(self) -> float:
        """Return the mean size of the errors."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def largest(self) -> int:
        """Return the devices of the largest point."""
        return max(point.devices for point in self.points)


class Prediction(NamedTuple):
    """Seconds of a step with their 95 % band, and the parameter that contributes the most to it."""

    seconds: float
    low: float
    high: float
    dominant: str


def fit(points: Sequence[Point], *, optional: Sequence[str] | None = None) -> Fit:
    """Fit all points together; `optional` are the terms of OPTIONAL to find, by default those that the points ask for.

    A term is asked for when it lowers Schwarz's criterion. Of terms that do the same at these points, such as the
    start-up cost and the bandwidth at one size, the first of TERMS is found and the others are fixed.
    """
    names = sorted({point.config for point in points if point.config is not None})
    chosen = _identifiable(points, names, [*ALWAYS, *(optional or ())])
    x, criterion = _solve(points, names, chosen)
    hosts = {point.hosts for point in points if point.hosts > 1}
    asked = [name for name in _ASKED if name != "hop" or len(hosts) >= _HOSTS_FOR_HOP]
    for _ in asked if optional is None else ():
        larger = [_identifiable(points, names, [*chosen, name]) for name in asked if name not in chosen]
        tried = [(*_solve(points, names, terms), terms) for terms in larger if len(terms) > len(chosen)]
        best = min(tried, key=lambda one: one[1], default=None)
        if best is None or best[1] > criterion - _EVIDENCE:
            break
        x, criterion, chosen = best
    return _summary(points, names, chosen, x)


def predict(found: Fit, config: str, devices: int, hosts: int, batch: float, size: float) -> Prediction:
    """Predict the step of a configuration with `batch` examples a replica and gradients of `size` bytes.

    The band has the covariance of the parameters with the spread of the fixed ones, the noise of a measurement, and a
    deviation for each doubling beyond the largest point: that the form of the model holds is assumed, too. No step is
    faster than the compute by itself, nor than that of fewer devices or hosts, each less its own uncertainty.
    """
    point = Point(config, devices, hosts, batch, size, 1.0)
    seconds, shares = _told(found, point)
    beyond = max(0.0, math.log2(devices / found.largest))
    widening = widening_of(found.noise, _DOUBLING * beyond, shares.sum())
    smaller = [p for p in found.points if (p.config, p.batch, p.size) == (config, batch, size) and p.hosts <= hosts]
    smaller = [p for p in smaller if p.devices * hosts <= devices * p.hosts]  # in a host
    faster = [_told(found, p) for p in (point._replace(devices=1, hosts=1), *smaller)]
    fastest = max(one / widening_of(found.noise, 0.0, of.sum()) for one, of in faster)
    titles = ["compute time", *(term.title for term in TERMS.values())]
    count = len(found.compute)
    dominant = titles[int(np.argmax([shares[:count].sum(), *shares[count:]]))]
    return Prediction(seconds, max(seconds / widening, fastest), seconds * widening, dominant)


def widening_of(noise: float, beyond: float = 0.0, variance: float = 0.0) -> float:
    """Return the factor from the middle of a 95 % band to its ends."""
    deviation = math.sqrt(noise**2 + beyond**2 + max(0.0, variance))
    return math.exp(min(1.96 * deviation, _WIDEST))


def _told(found: Fit, point: Point) -> tuple[float, np.ndarray]:
    """Return the seconds of a step, and the share of each parameter in the variance of their logarithm."""
    names = list(found.compute)
    x = np.array([*found.compute.values(), *found.terms.values()])
    slope = _slopes([point], names, x)[0]
    return float(_seconds([point], names, x)[0]), slope * (found.covariance @ slope)


def _seconds(points: Sequence[Point], names: Sequence[str], x: np.ndarray) -> np.ndarray:
    """Return the step times for parameters x: compute an example of each configuration, then each of TERMS."""
    value = {name: scale * TERMS[name].unit for name, scale in zip(TERMS, x[len(names) :], strict=True)}
    devices, hosts, batch, size = (
        np.array([getattr(point, field) for point in points]) for field in ("devices", "hosts", "batch", "size")
    )
    compute = batch * [0.0 if point.config is None else x[names.index(point.config)] for point in points]
    communication = value["start"] * (devices > 1) + scaling.hierarchical(
        devices / hosts, hosts, size, inside=(0.0, value["inside"]), across=(value["hop"], value["across"])
    )
    exposed = scaling.exposed(np.where(size > 0, communication, 0.0), compute, overlap=value["overlap"])
    slowest = np.array([scaling.expected_max(point.devices) for point in points])
    return compute + exposed + value["straggler"] * slowest * compute


def _slopes(points: Sequence[Point], names: Sequence[str], x: np.ndarray) -> np.ndarray:
    """Return d log(seconds) / dx, a row for each point."""
    steps = 1e-6 * np.maximum(np.abs(x), 1e-3)
    here = np.log(_seconds(points, names, x))
    moved = [np.log(_seconds(points, names, x + step)) for step in np.diag(steps)]
    return (np.stack(moved, 1) - here[:, None]) / steps


def _first_guess(points: Sequence[Point], names: Sequence[str]) -> np.ndarray:
    """Return a compute time of each configuration that is below its step times."""
    return np.array([0.8 * min(p.seconds / p.batch for p in points if p.config == name) for name in names])


def _identifiable(points: Sequence[Point], names: Sequence[str], terms: Sequence[str]) -> tuple[str, ...]:
    """Return the terms whose effect on these points no combination of the terms before them has."""
    x = np.concatenate([_first_guess(points, names), [0.05 if name in ALWAYS else 0.0 for name in TERMS]])
    slopes = _slopes(points, names, x)
    columns = slopes[:, : len(names)]
    chosen = []
    for name in terms:
        column = slopes[:, len(names) + list(TERMS).index(name)]
        rest = column - columns @ np.linalg.lstsq(columns, column, rcond=None)[0]
        if np.linalg.norm(rest) > 1e-3 * np.linalg.norm(column):
            chosen.append(name)
            columns = np.column_stack([columns, column])
    return tuple(chosen)


def _solve(points: Sequence[Point], names: Sequence[str], terms: Sequence[str]) -> tuple[np.ndarray, float]:
    """Return the parameters with the least squares of the relative errors, and Schwarz's criterion."""
    guess = _first_guess(points, names)
    measured = np.array([point.seconds for point in points])
    free = [len(names) + k for k, name in enumerate(TERMS) if name in terms]

    def parameters(y: np.ndarray) -> np.ndarray:
        x = np.concatenate([y[: len(names)] * guess, _fixed(points)])
        x[free] = y[len(names) :]
        return x

    highest = [*[math.inf] * len(names), *(TERMS[name].highest for name in TERMS if name in terms)]
    results = [
        least_squares(
            lambda y: _seconds(points, names, parameters(y)) / measured - 1,
            np.array([*[1.0] * len(names), *[start] * len(free)]),
            bounds=([*[_LEAST_COMPUTE] * len(names), *[0.0] * len(free)], highest),
            x_scale="jac",
            ftol=1e-12,
            xtol=1e-12,
        )
        for start in (0.01, 1.0)  # with overlap the sum of squares can have two valleys
    ]
    best = min(results, key=lambda result: result.cost)
    count = len(points)
    criterion = count * math.log(2 * best.cost / count + _FLOOR**2) + len(highest) * math.log(count)
    x = parameters(best.x)
    x[free] = np.where(x[free] < _NOTHING, 0.0, x[free])
    return x, criterion


def _fixed(points: Sequence[Point]) -> list[float]:
    """Return the values of terms that are not found: what is assumed, or 0 where another term has their part in it."""
    measured = {
        "across": any(point.hosts > 1 for point in points),
        "inside": any(point.devices > point.hosts for point in points),
        "start": True,
    }
    return [0.0 if measured.get(name) else term.assumed for name, term in TERMS.items()]


def _summary(points: Sequence[Point], names: Sequence[str], terms: Sequence[str], x: np.ndarray) -> Fit:
    errors = _seconds(points, names, x) / [point.seconds for point in points] - 1
    freedom = max(0, len(points) - len(names) - len(terms))
    noise = math.sqrt((errors @ errors + _NOISE_WEIGHT * _NOISE**2) / (freedom + _NOISE_WEIGHT))
    slopes = _slopes(points, names, x) / noise
    weight = [0.0 if name in terms else term.spread**-2 for name, term in TERMS.items()]
    precision = slopes.T @ slopes + np.diag([*[0.0] * len(names), *weight])
    scale = 1 / np.sqrt(np.diag(precision))  # the parameters are of different sizes
    covariance = scale[:, None] * np.linalg.pinv(precision * np.outer(scale, scale), hermitian=True) * scale
    return Fit(
        compute=dict(zip(names, x[: len(names)].tolist(), strict=True)),
        terms=dict(zip(TERMS, x[len(names) :].tolist(), strict=True)),
        free=tuple(terms),
        covariance=covariance,
        noise=noise,
        freedom=freedom,
        points=tuple(points),
        errors=tuple(errors.tolist()),
    )
