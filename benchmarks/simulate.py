"""Simulate a long run on machines that nobody here has: slow workers, failures, checkpoints, restarts.

    rng = np.random.default_rng(0)
    steps = slowest(lognormal(mean=0.3, cv=0.02), workers=4096, steps=100_000, rng=rng)
    goodput(steps, Failures(mtbf=5e6 / 4096, restart=300), checkpoint=20, every=400, rng=rng)

All times are in seconds. The seed decides everything.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Quantile = Callable[[np.ndarray], np.ndarray]  # a distribution of one worker's step time, as its inverse


class Failures(NamedTuple):
    """Failures of the whole job, without memory: the mean time between two, and what one costs before steps go on."""

    mtbf: float  # that of one worker, divided by the number of workers
    restart: float


def lognormal(*, mean: float, cv: float) -> Quantile:
    """Return the log-normal distribution of this mean and coefficient of variation."""
    if cv == 0:
        return lambda share: np.full_like(share, mean)
    sigma = math.sqrt(math.log(1 + cv**2))
    return stats.lognorm(sigma, scale=mean * math.exp(-(sigma**2) / 2)).ppf


def measured(samples: Sequence[float]) -> Quantile:
    """Return the distribution of measured step times. No worker is slower than the slowest of them."""
    ordered = np.sort(samples)
    return lambda share: ordered[np.minimum((share * len(ordered)).astype(int), len(ordered) - 1)]


def slowest(worker: Quantile, *, workers: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Return the step times `[steps]` of the slowest of `workers`, each with its own draw from one distribution.

    The largest of p draws has the distribution F^p, so that one draw a step does: F^-1(U^(1/p)).
    """
    return worker(rng.random(steps) ** (1 / workers))


def goodput(
    steps: np.ndarray, failures: Failures, *, checkpoint: float, every: int, rng: np.random.Generator, count: int = 2000
) -> float:
    """Return the share of the time that steps take which are not lost, over `count` failures.

    A checkpoint stops the steps for `checkpoint` seconds after each `every` steps. A failure, which can also come
    while the run restarts or writes, loses the steps since the last whole checkpoint; the next attempt repeats them.
    Step times are taken from `steps` in turn, again from the start where there are too few.
    """
    whole = len(steps) // every * every
    if not whole:
        raise ValueError(f"{len(steps)} steps have no checkpoint when one is written every {every}")
    rounds = steps[:whole].reshape(-1, every).sum(1)
    ends = np.concatenate([[0.0], np.cumsum(rounds + checkpoint)])
    useful = np.concatenate([[0.0], np.cumsum(rounds)])
    between = rng.exponential(failures.mtbf, count)
    kept, at = 0.0, 0
    for left in between - failures.restart:
        while left > 0:
            end = int(np.searchsorted(ends, ends[at] + left, side="right")) - 1
            kept += useful[end] - useful[at]
            if end < len(rounds):
                at = end
                break
            left -= ends[end] - ends[at]
            at = 0
    return kept / between.sum()


def best_interval(checkpoint: float, mtbf: float) -> float:
    """Return the seconds of steps between checkpoints that lose the least time: sqrt(2 checkpoint mtbf), refined.

    Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 37.
    """
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(checkpoint / (2 * mtbf))
    return math.sqrt(2 * checkpoint * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - checkpoint
