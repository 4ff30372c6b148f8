"""The scaling model: what a step costs on p devices, in seconds, bytes and seconds a byte.

    T = max(compute + exposed communication + stragglers, input)

Pure formulas; `benchmarks.fitting` finds their parameters.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from scipy import integrate, special

Number = Any  # a float, or an array of them


def ring(ranks: Number, size: Number, *, latency: float, per_byte: float) -> Number:
    """Return the seconds of a ring all-reduce of `size` bytes: 2 (p - 1) messages of size / p bytes."""
    return 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size * per_byte


def hierarchical(
    devices_per_host: Number, hosts: Number, size: Number, *, inside: tuple[float, float], across: tuple[float, float]
) -> Number:
    """Return the seconds of an all-reduce in three parts: reduce-scatter in a host, all-reduce across, all-gather.

    `inside` and `across` are (seconds a message, seconds a byte). All bytes of a host cross its one link: `across` of
    a host with k links in parallel has 1 / k of the seconds a byte.
    """
    return ring(devices_per_host, size, latency=inside[0], per_byte=inside[1]) + ring(
        hosts, size, latency=across[0], per_byte=across[1]
    )


def exposed(communication: Number, backward: Number, *, overlap: float = 0.0) -> Number:
    """Return what is left of the communication when it runs beside a part `overlap` of the backward pass."""
    return np.maximum(communication - overlap * backward, 0.0)


@cache
def expected_max(ranks: int) -> float:
    """Return E[max] of `ranks` standard Gaussian draws: a step waits mean + sigma * this for the slowest of them."""
    if ranks == 1:
        return 0.0
    # E[max] = integral of x d(F^p); in logarithms, for F^p of thousands of ranks.
    logarithm = math.log(ranks) - math.log(2 * math.pi) / 2
    return integrate.quad(
        lambda x: x * math.exp(logarithm - x * x / 2 + (ranks - 1) * special.log_ndtr(x)), -10, 10, limit=200
    )[0]


def bound_by_input(step: Number, hosts: Number, batch: Number, *, per_host: float) -> Number:
    """Return the step time when each host can read `per_host` examples a second and `batch` is the global one.

    The input is read beside the step, so the longer counts and not the sum.
    """
    return np.maximum(step, batch / (hosts * per_host))
