"""Simulate a long run on machines that nobody here has: slow workers, failures, checkpoints, restarts.

    rng = np.random.default_rng(0)
    steps = slowest(lognormal(mean=0.3, cv=0.02), workers=4096, steps=100_000, rng=rng)
    goodput(rounds(steps, 400, rng=rng), Failures(mtbf=5e6 / 4096, restart=300), checkpoint=20, rng=rng)

All times are in seconds. The seed decides everything.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

# A distribution of one worker's step time, as its inverse: from the logarithm of the share of steps that are faster,
# as of a million workers the slowest is where the share itself rounds to 1.
Quantile = Callable[[np.ndarray], np.ndarray]

_EXACT = 100  # steps of a round that are drawn one by one; the sum of more of them is as good as Gaussian
_ROUNDS = 1000  # of more steps than that


class Failures(NamedTuple):
    """Failures of the whole job, without memory: the mean time between two, and what one costs before steps go on."""

    mtbf: float  # that of one worker, divided by the number of workers
    restart: float


def lognormal(*, mean: float, cv: float) -> Quantile:
    """Return the log-normal distribution of this mean and coefficient of variation."""
    sigma = math.sqrt(math.log(1 + cv**2))
    return lambda log_share: mean * np.exp(sigma * special.ndtri_exp(log_share) - sigma**2 / 2)


def measured(samples: Sequence[float]) -> Quantile:
    """Return the distribution of measured step times. No worker is slower than the slowest of them."""
    ordered = np.sort(samples)
    return lambda log_share: ordered[np.minimum((np.exp(log_share) * len(ordered)).astype(int), len(ordered) - 1)]


def slowest(worker: Quantile, *, workers: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Return the step times `[steps]` of the slowest of `workers`, each with its own draw from one distribution.

    The largest of p draws has the distribution F^p, so that one draw a step does: F^-1(U^(1/p)). The logarithm of U
    is an exponential draw, negative.
    """
    return worker(-rng.exponential(size=steps) / workers)


def rounds(steps: np.ndarray, every: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return the seconds of rounds of `every` steps, between two checkpoints, of independent steps such as `steps`.

    Its memory does not grow with `every`: the sum of many steps is Gaussian (central limit theorem).
    """
    if every <= min(_EXACT, len(steps)):
        return steps[: len(steps) // every * every].reshape(-1, every).sum(1)
    sums = rng.normal(every * steps.mean(), math.sqrt(every) * steps.std(), _ROUNDS)
    return np.maximum(sums, every * steps.min())


def goodput(
    rounds: np.ndarray,
    failures: Failures,
    *,
    checkpoint: float,
    rng: np.random.Generator,
    count: int = 10_000,
) -> float:
    """Return the share of the time that steps take which are not lost, over `count` failures.

    A checkpoint stops the steps for `checkpoint` seconds after each round. A failure, which can also come while the
    run restarts or writes, loses the steps since the last whole checkpoint; the next attempt repeats them. An attempt
    takes the seconds of `rounds` in turn, from anywhere on, again from the start after the last.
    """
    ends = np.concatenate([[0.0], np.cumsum(rounds + checkpoint)])
    useful = np.concatenate([[0.0], np.cumsum(rounds)])
    between = rng.exponential(failures.mtbf, count)
    first = rng.integers(len(rounds), size=count)
    passes, rest = np.divmod(ends[first] + np.maximum(between - failures.restart, 0.0), ends[-1])
    last = np.searchsorted(ends, rest, side="right") - 1
    kept = passes * useful[-1] + useful[last] - useful[first]
    return float(kept.sum() / between.sum())


def best_interval(checkpoint: float, mtbf: float) -> float:
    """Return the seconds of steps between checkpoints that lose the least time: sqrt(2 checkpoint mtbf), refined.

    Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 37.
    """
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(checkpoint / (2 * mtbf))
    return math.sqrt(2 * checkpoint * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - checkpoint
