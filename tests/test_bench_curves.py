"""The lines of the figures are those of planted costs."""

import pytest

from benchmarks import curves
from benchmarks.cases import Case
from tests import bench_records


def test_the_cost_of_all_reduces_is_found():
    points = [line for line in bench_records.on_gpus() if line["kind"] == "comm_point"]
    (fit,) = curves.of_all_reduces(points)
    assert fit["parameters"] == pytest.approx({"latency_s": 60e-6, "bytes_per_s": 6e9})
    assert fit["error"]["max"] == pytest.approx(0, abs=1e-9)
    assert (fit["what"], fit["replicas"], fit["hosts"], fit["points"]) == ("sweep", 8, 2, len(points))
    for size, on_bus in fit["curve"]:
        assert on_bus == pytest.approx(2 * 7 / 8 * size / (60e-6 + size / 6e9))


def sweep(seconds):
    """Return the lines of a weak sweep whose steps take so many seconds, by workers of one replica, each on a host."""
    lines = []
    for workers, step in seconds.items():
        case = Case("resnet50", workers=workers, per_replica_batch=128)
        lines += bench_records.launches_of(case)
        lines.append(bench_records.result(case, case.global_batch / step, units_per_example=1))
    return lines


def test_the_curve_of_a_sweep_is_that_of_its_model():
    lines = sweep({n: 0.1 + 0.04 * (n - 1) / n for n in (1, 2, 4, 8)})
    (fit,) = curves.of_sweeps(lines)
    assert fit["model"] == "scaling: fits"
    assert (fit["key"], fit["per_replica_batch"]) == (Case("resnet50").scaling_key, 128)
    assert [size for size, _ in fit["curve"]] == list(range(1, 9))
    for size, rate in fit["curve"]:
        assert rate == pytest.approx(128 * size / (0.1 + 0.04 * (size - 1) / size), rel=0.02)


def test_what_the_model_does_not_explain_has_no_curve():
    (fit,) = curves.of_sweeps(sweep({1: 0.1, 2: 0.35, 4: 0.12, 8: 0.5}))
    assert fit["model"] == "scaling: unexplained"
    assert "curve" not in fit


def test_two_sizes_have_no_line():
    assert curves.of_sweeps(sweep({1: 0.1, 2: 0.12})) == []
    points = [line for line in bench_records.on_gpus() if line["kind"] == "comm_point"]
    assert curves.of_all_reduces(points[:2]) == []
