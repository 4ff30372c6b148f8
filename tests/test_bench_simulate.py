"""The simulator: what is known of stragglers, failures and checkpoints comes out of it."""

import math

import numpy as np
import pytest

from benchmarks import scaling, simulate
from benchmarks.simulate import Failures


def one_by_one(steps, failures, *, checkpoint, every, rng, count):
    """Live through every step, checkpoint and failure; return the goodput."""
    between = rng.exponential(failures.mtbf, count)
    first = rng.integers(len(steps) // every, size=count)
    kept = 0.0
    for left, saved in zip(between - failures.restart, first * every, strict=True):
        while left > 0:
            block = [steps[(saved + k) % len(steps)] for k in range(every)]
            left -= sum(block) + checkpoint
            if left >= 0:
                kept += sum(block)
                saved += every
    return kept / between.sum()


def of_steps(steps, failures, *, every, **given):
    """Return the goodput with a checkpoint after each `every` of these steps."""
    return simulate.goodput(steps.reshape(-1, every).sum(1), failures, **given)


@pytest.mark.parametrize(("every", "restart"), [(1, 0.0), (10, 50.0), (100, 5.0), (500, 200.0)])
def test_goodput_is_that_of_living_through_every_step(every, restart):
    steps = np.random.default_rng(1).uniform(0.5, 1.5, 1000)
    given = {"checkpoint": 3.0, "every": every, "count": 100}
    ours, theirs = (
        function(steps, Failures(400.0, restart), rng=np.random.default_rng(0), **given)
        for function in (of_steps, one_by_one)
    )
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_goodput_of_equal_steps_is_what_is_known():
    # Rounds of w + c seconds without memory of failures: w / mtbf / (exp((w + c) / mtbf) - 1), with the restart
    # exp(-restart / mtbf) of it.
    mtbf, restart, checkpoint, every = 1000.0, 60.0, 10.0, 120
    known = every / mtbf / math.expm1((every + checkpoint) / mtbf) * math.exp(-restart / mtbf)
    rng = np.random.default_rng(0)
    found = of_steps(np.ones(1200), Failures(mtbf, restart), checkpoint=checkpoint, every=every, rng=rng, count=200_000)
    assert found == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize(("checkpoint", "mtbf"), [(10.0, 5_000.0), (60.0, 20_000.0), (30.0, 3_000.0)])
def test_goodput_peaks_at_the_interval_of_young_and_daly(checkpoint, mtbf):
    intervals = np.geomspace(0.2, 5, 33) * math.sqrt(2 * checkpoint * mtbf)
    goodputs = [
        of_steps(
            np.ones(100 * round(interval)),
            Failures(mtbf, 120.0),
            checkpoint=checkpoint,
            every=round(interval),
            rng=np.random.default_rng(0),
            count=20_000,
        )
        for interval in intervals
    ]
    # The peak is flat: a parabola through it in the logarithm of the interval is less noisy than its highest point.
    near = np.array(goodputs) > max(goodputs) - 0.02
    a, b, _ = np.polyfit(np.log(intervals[near]), np.array(goodputs)[near], 2)
    assert math.exp(-b / (2 * a)) == pytest.approx(simulate.best_interval(checkpoint, mtbf), rel=0.15)
    assert simulate.best_interval(checkpoint, mtbf) == pytest.approx(math.sqrt(2 * checkpoint * mtbf), rel=0.1)


def test_goodput_falls_with_the_rate_of_failures_and_the_cost_of_a_checkpoint():
    def of(mtbf, checkpoint):
        rng = np.random.default_rng(0)
        return of_steps(np.ones(10_000), Failures(mtbf, 60.0), checkpoint=checkpoint, every=100, rng=rng)

    rates = [of(mtbf, 10.0) for mtbf in (100.0, 1_000.0, 10_000.0)]
    costs = [of(1_000.0, checkpoint) for checkpoint in (100.0, 10.0, 0.0)]
    assert rates == sorted(rates)
    assert costs == sorted(costs)
    assert all(0 <= share <= 1 for share in [*rates, *costs])


def test_without_failures_only_checkpoints_cost():
    rng = np.random.default_rng(0)
    found = of_steps(np.ones(950), Failures(1e12, 0.0), checkpoint=5.0, every=95, rng=rng, count=3)
    assert found == pytest.approx(0.95, rel=1e-6)


@pytest.mark.parametrize("workers", [2, 64, 4096])
def test_the_slowest_worker_follows_the_order_statistics(workers):
    found = simulate.slowest(
        simulate.lognormal(mean=1.0, cv=0.01), workers=workers, steps=20_000, rng=np.random.default_rng(0)
    )
    assert found.mean() == pytest.approx(1 + 0.01 * scaling.expected_max(workers), abs=1e-3)


def test_the_slowest_of_measured_times_is_as_when_each_worker_draws():
    rng = np.random.default_rng(0)
    samples = rng.gamma(9.0, 0.1, 500)
    ours = simulate.slowest(simulate.measured(samples), workers=20, steps=50_000, rng=rng)
    theirs = rng.choice(samples, (50_000, 20)).max(1)
    assert ours.mean() == pytest.approx(theirs.mean(), rel=5e-3)
    assert np.quantile(ours, [0.1, 0.9]) == pytest.approx(np.quantile(theirs, [0.1, 0.9]), rel=1e-2)


def test_a_log_normal_has_its_mean_and_its_deviation():
    drawn = simulate.lognormal(mean=0.3, cv=0.2)(np.log(np.random.default_rng(0).random(200_000)))
    assert (drawn.mean(), drawn.std() / drawn.mean()) == pytest.approx((0.3, 0.2), rel=0.01)


def test_thousands_of_workers_for_a_hundred_thousand_steps_are_simulated_from_one_seed():
    def run():
        rng = np.random.default_rng(7)
        steps = simulate.slowest(simulate.lognormal(mean=0.3, cv=0.02), workers=4096, steps=100_000, rng=rng)
        rounds = simulate.rounds(steps, 400, rng=rng)
        return simulate.goodput(rounds, Failures(5e6 / 4096, 300.0), checkpoint=20.0, rng=rng)

    assert 0 < run() == run() < 1


@pytest.mark.parametrize("every", [1, 100, 101, 5000])
def test_rounds_are_sums_of_steps(every):
    rng = np.random.default_rng(0)
    steps = simulate.slowest(simulate.lognormal(mean=1.0, cv=0.1), workers=64, steps=100_000, rng=rng)
    found = simulate.rounds(steps, every, rng=rng)
    assert found.mean() == pytest.approx(every * steps.mean(), rel=1e-3)
    assert found.std() == pytest.approx(math.sqrt(every) * steps.std(), rel=0.1)


def test_rounds_of_any_number_of_steps_take_no_memory():
    rng = np.random.default_rng(0)
    found = simulate.rounds(np.array([1.0, 1.2]), 10**12, rng=rng)
    assert len(found) <= 1000
    assert found == pytest.approx(1.1e12, rel=1e-4)
    assert 0.99 < simulate.goodput(found, Failures(1e18, 0.0), checkpoint=1e3, rng=rng) < 1


def test_the_slowest_of_a_billion_workers_takes_a_finite_time():
    rng = np.random.default_rng(0)
    worker = simulate.lognormal(mean=1.0, cv=0.01)
    found = simulate.slowest(worker, workers=10**9, steps=100_000, rng=rng)
    assert found.mean() == pytest.approx(1 + 0.01 * scaling.expected_max(10**9), abs=3e-3)
    assert found.max() < 1.1
    assert simulate.slowest(simulate.measured([1, 2]), workers=10**9, steps=10, rng=rng).tolist() == [2] * 10
