"""Medians and their intervals against SciPy, against loops that draw as it is told, and against planted truths."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import statistics
from tests.planted_runs import step_ms


@pytest.mark.parametrize("count", [5, 8, 11, 20])
def test_the_interval_of_launches_of_one_window_is_that_of_scipy(count):
    values = np.random.default_rng(count).lognormal(size=count)
    found = statistics.interval([[value] for value in values])
    theirs = stats.bootstrap((values,), np.median, method="percentile", n_resamples=10_000, rng=1)
    # Medians of resamples are values or the middle of two; both draw them at random.
    steps = np.sort(np.add.outer(values, values).ravel() / 2)
    for ours, reference in zip((found.low, found.high), theirs.confidence_interval, strict=True):
        assert abs(np.searchsorted(steps, ours) - np.searchsorted(steps, reference)) <= 4
    assert found.median == np.median(values)
    assert found.launches == tuple(values)


def test_windows_are_drawn_within_the_launches_that_are_drawn():
    rng = np.random.default_rng(0)
    launches = [rng.normal(mean, 1, size).tolist() for mean, size in [(10, 1), (10.5, 2), (11, 7), (9, 40), (10, 15)]]

    def resample():
        drawn = [launches[index] for index in rng.integers(len(launches), size=len(launches))]
        return np.median([np.median(rng.choice(windows, size=len(windows))) for windows in drawn])

    slow = [resample() for _ in range(4000)]
    fast = statistics._draws(launches, np.random.default_rng(1))
    assert stats.ks_2samp(slow, fast).pvalue > 0.05


@pytest.mark.parametrize("launches", [5, 10])
def test_about_95_of_100_intervals_hold_the_true_value(launches):
    rng = np.random.default_rng(launches)
    found = [statistics.interval(step_ms(rng, launches), seed=trial) for trial in range(100)]
    assert 0.9 <= np.mean([one.low <= 10 <= one.high for one in found]) <= 0.99


def test_at_least_95_of_100_ratios_hold_the_true_ratio():
    rng = np.random.default_rng(0)
    found = [statistics.ratio(step_ms(rng, 5), step_ms(rng, 5, mean=11), seed=trial) for trial in range(60)]
    assert np.mean([one.low <= 1.1 <= one.high for one in found]) >= 0.95


def test_the_same_launches_give_the_same_interval():
    launches = step_ms(np.random.default_rng(0), 5)
    assert statistics.interval(launches) == statistics.interval(launches)
    assert statistics.interval(launches).to_dict()["launches"] == [np.median(windows) for windows in launches]


def test_a_ratio_is_new_by_base_and_its_p_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    base, new = step_ms(rng, 5), step_ms(rng, 6, mean=11)
    found = statistics.ratio(base, new)
    medians = [np.median(side, axis=1) for side in (base, new)]
    assert found.median == np.median(medians[1]) / np.median(medians[0])
    assert found.low < found.median < found.high
    assert found.p == stats.mannwhitneyu(*medians).pvalue
    assert statistics.ratio(base, new[:4]).p is None


def test_the_probability_of_a_ratio_follows_student():
    ratio = statistics.Ratio(median=0.9, low=0.8, high=1.0, error=0.05, freedom=8, p=None)
    assert ratio.p_below(0.9) == 0.5
    assert ratio.p_below(1.0) == pytest.approx(stats.t.cdf(np.log(0.9) / 0.05, 8), rel=1e-12)


def test_the_geometric_mean_of_ratios_is_closer_known_than_each():
    one = statistics.Ratio(median=0.8, low=0.7, high=0.9, error=0.06, freedom=8, p=None)
    other = statistics.Ratio(median=1.25, low=1.1, high=1.4, error=0.06, freedom=8, p=None)
    mean = statistics.geometric_mean([one, other])
    assert mean.median == pytest.approx(1, rel=1e-12)
    assert np.log([mean.low, mean.high]) == pytest.approx(np.array([-1, 1]) * 0.06 / 2**0.5 * stats.t.ppf(0.975, 16))


def test_jitter_is_the_scaled_deviation_of_scipy():
    values = np.random.default_rng(0).lognormal(size=51)
    assert statistics.jitter(values) == pytest.approx(stats.median_abs_deviation(values, scale="normal"), rel=1e-12)


def test_holm_corrects_for_the_number_of_tests():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1, 1]


@pytest.mark.parametrize("launches", [[], [[1.0], []]])
def test_a_launch_without_windows_is_refused(launches):
    with pytest.raises(ValueError, match="a launch without windows has no median"):
        statistics.interval(launches)
