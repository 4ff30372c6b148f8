"""What measured sizes say of larger ones, as JSON values, for the command and for figures: the fit and predictions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import explained, scaling, simulate
from benchmarks.explained import Explanation
from benchmarks.fitting import TERMS, Fit, Point, Prediction, widening_of
from distloop.errors import UsageError

INPUT = "input"  # what decides where hosts read more slowly than the steps go
_DRAWN = 100_000  # steps of each size
_NO_RATES: Mapping[str, float] = {}


@dataclass(frozen=True)
class Reliability:
    """What the machines do to a long run: seconds between failures of one device, of a checkpoint, of a restart.

    `worker` is the distribution of a device's step time, of mean 1.
    """

    mtbf: float
    checkpoint: float
    restart: float
    worker: simulate.Quantile


def study(
    given: Sequence[Point],
    devices_per_host: int | None,
    fit_up_to: int | None,
    at: Sequence[int],
    *,
    input_rates: Mapping[str, float] = _NO_RATES,
    failing: Reliability | None = None,
) -> dict[str, Any]:
    """Fit the points of at most `fit_up_to` devices; return the fit and the predictions at these sizes as JSON values.

    Sizes beyond one host have hosts as full as those of the points. `input_rates` are the examples a second that a host
    can read, by configuration. From the size on at which held-out points are outside of the band, the predictions are
    as if that had been known: unexplained or saturated. Raises UsageError if there is nothing to fit.
    """
    largest = max(point.devices for point in given) if fit_up_to is None else fit_up_to
    fitted = [point for point in given if point.devices <= largest]
    configs = [name for name in dict.fromkeys(point.config for point in fitted) if name is not None]
    if not configs:
        smallest = min(point.devices for point in given if point.config is not None)
        raise UsageError(
            f"fit_up_to is {largest}, and the smallest row has {smallest} devices; there is nothing to fit."
        )
    known = explained.explain(fitted)
    held_out = [_compare(known, point) for point in given if point.devices > largest and point.config in configs]
    outside = min((row["devices"] for row in held_out if not row["in_band"]), default=math.inf)
    said = known if outside == math.inf else explained.contradicted(known, given, int(outside))
    full = _devices_per_host(given, devices_per_host)
    predictions = []
    for config in configs:
        own = [point for point in given if point.config == config]
        for devices in at or [2 * known.fit.largest]:
            hosts = math.ceil(devices / full)
            batch = _batch(own, devices, largest)
            size = max(point.size for point in own)
            found = explained.foretell(said if devices >= outside else known, config, devices, hosts, batch, size)
            if devices >= outside:
                found = found._replace(dominant=said.status)
            step = Point(config, devices, hosts, batch, size, found.seconds)
            rate = input_rates.get(config, math.inf)
            fields = _as_json(config, devices, batch, _with_input(found, step, rate, known.fit.noise))
            predictions.append(fields | (_long_run(known.fit, step, rate, failing) if failing else {}))
    left_out = sorted({point.config for point in given if point.config is not None} - set(configs))
    return {"fit": _fit_as_json(said, held_out) | {"left_out": left_out}, "predictions": predictions}


def _devices_per_host(given: Sequence[Point], stated: int | None) -> int:
    """Return how many devices a full host has: what all points of several hosts have, or else what is stated."""
    several = {math.ceil(point.devices / point.hosts) for point in given if point.hosts > 1}
    if len(several) == 1:
        return several.pop()
    return stated or max(math.ceil(point.devices / point.hosts) for point in given)


def _batch(own: Sequence[Point], devices: int, largest: int) -> float:
    """Return the examples a replica at a size: as measured there, as the one global batch gives, or as at `largest`."""
    if same := [point.batch for point in own if point.devices == devices]:
        return same[0]
    if len({point.devices * point.batch for point in own}) == 1 and len({point.batch for point in own}) > 1:
        return own[0].devices * own[0].batch / devices
    return max((point for point in own if point.devices <= largest), key=lambda point: point.devices).batch


def _with_input(found: Prediction, step: Point, rate: float, noise: float) -> Prediction:
    """Return a prediction of a step that is no faster than hosts read, of `rate` examples a second each."""
    reading = float(scaling.bound_by_input(0.0, step.hosts, step.devices * step.batch, per_host=rate))
    widening = widening_of(noise)
    return Prediction(
        max(found.seconds, reading),
        max(found.low, reading / widening),
        max(found.high, reading * widening),
        INPUT if reading > found.seconds else found.dominant,
    )


def _as_json(config: str, devices: int, batch: float, found: Prediction) -> dict[str, Any]:
    examples = devices * batch
    return {
        "config": config,
        "devices": devices,
        "throughput": examples / found.seconds,
        "low": examples / found.high,
        "high": examples / found.low,
        "dominant": found.dominant,
    }


def _long_run(fit: Fit, step: Point, rate: float, failing: Reliability) -> dict[str, float]:
    """Return what is left of the throughput when devices are slow by chance and fail, at the best interval."""
    rng = np.random.default_rng(0)
    examples = step.devices * step.batch
    steps = scaling.bound_by_input(_draw(fit, step, failing.worker, rng), step.hosts, examples, per_host=rate)
    mean = float(steps.mean())
    mtbf = failing.mtbf / step.devices
    every = max(1, round(simulate.best_interval(failing.checkpoint, mtbf) / mean))
    share = simulate.goodput(
        simulate.rounds(steps, every, rng=rng),
        simulate.Failures(mtbf, failing.restart),
        checkpoint=failing.checkpoint,
        rng=rng,
    )
    return {
        "goodput": share,
        "sustained": share * examples / mean,
        "checkpoint_every_steps": every,
        "checkpoint_every_seconds": every * mean,
    }


def _draw(fit: Fit, step: Point, worker: simulate.Quantile, rng: np.random.Generator) -> np.ndarray:
    """Return seconds `[steps]`: of the slowest of the devices, and all that the model adds to their compute.

    What was measured has the wait for the slowest of as many devices; only what more of them wait longer is new.
    """
    compute = fit.compute[step.config or ""] * step.batch
    known = min(step.devices, fit.largest)
    before = simulate.slowest(worker, workers=known, steps=_DRAWN, rng=rng).mean()
    slowest = simulate.slowest(worker, workers=step.devices, steps=_DRAWN, rng=rng)
    return step.seconds + compute * (slowest / before - 1)


def _compare(known: Explanation, point: Point) -> dict[str, Any]:
    found = explained.foretell(known, point.config or "", point.devices, point.hosts, point.batch, point.size)
    examples = point.devices * point.batch
    return {
        "config": point.config,
        "devices": point.devices,
        "throughput": examples / point.seconds,
        "predicted": examples / found.seconds,
        "error": point.seconds / found.seconds - 1,  # of the predicted throughput
        "in_band": found.low <= point.seconds <= found.high,
    }


def _fit_as_json(known: Explanation, held_out: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fit = known.fit
    value = {name: scale * TERMS[name].unit for name, scale in fit.terms.items()}
    return {
        "status": known.status,
        "reason": known.reason,
        "points": len(fit.points),
        "mean_error": fit.mean_error,
        "max_error": max(abs(error) for error in fit.errors),
        "compute_seconds_per_example": fit.compute,
        "inter_host_bytes_per_second": 1 / value["across"] if value["across"] else None,
        "intra_host_bytes_per_second": 1 / value["inside"] if value["inside"] else None,
        "start_up_seconds": value["start"],
        "hop_seconds": value["hop"],
        "overlap": value["overlap"],
        "straggler_deviation": value["straggler"],
        "fixed": [name for name in TERMS if name not in fit.free],
        "limits": known.limits,
        "held_out": held_out,
        "held_out_mean_error": float(np.mean([abs(row["error"]) for row in held_out])) if held_out else None,
    }
