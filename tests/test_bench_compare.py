"""Equal runs are the same, slower ones are found, and what cannot be compared is told in a sentence."""

import json

import numpy as np
import pytest

from benchmarks import compare, comparison, environment, records, results
from benchmarks.cases import Case
from benchmarks.statistics import Ratio
from distloop.errors import UsageError
from tests import harness
from tests.planted_runs import CASE, ENV, launches_of, step_ms, write


def run_of(*steps, cases=(CASE,)):
    """Return a run in memory, with the milliseconds a step of one case after the other."""
    found = {
        case.key: results.summarize(case, launches_of(rows), env="e") for case, rows in zip(cases, steps, strict=True)
    }
    return comparison.Run(found, {case.key: rows for case, rows in zip(cases, steps, strict=True)}, {"e": ENV})


def verdicts(base, new, tolerance=0.03):
    return [pair.verdict for pair in comparison.compare(base, new, tolerance)]


def test_equal_runs_of_10_launches_are_the_same_at_least_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [verdicts(run_of(step_ms(rng, 10)), run_of(step_ms(rng, 10))) for _ in range(20)]
    assert found.count(["same"]) >= 19


@pytest.mark.parametrize("launches", [5, 10])
def test_a_slowdown_by_10_percent_is_always_found(launches):
    rng = np.random.default_rng(launches)
    slow = [run_of(step_ms(rng, launches, mean=10 / 0.9)) for _ in range(20)]
    assert [verdicts(run_of(step_ms(rng, launches)), run) for run in slow] == [["regressed"]] * 20


def test_among_many_cases_a_slow_one_is_found_and_no_other():
    rng = np.random.default_rng(0)
    cases = [Case("mnist_cnn", per_replica_batch=size) for size in range(1, 9)]
    base = run_of(*(step_ms(rng, 8) for _ in cases), cases=cases)
    new = run_of(*(step_ms(rng, 8, mean=9 if case is cases[3] else 10) for case in cases), cases=cases)
    assert verdicts(new, base)[3] == "regressed"
    assert verdicts(base, new)[3] == "improved"
    assert verdicts(base, new).count("improved") == 1


def test_the_floor_of_a_machine_is_what_equal_runs_differ_by():
    rng = np.random.default_rng(0)
    floors = [comparison.floor_of(step_ms(rng, 10)) for _ in range(20)]
    passed = [comparison.floor_of(step_ms(rng, 10, launch_cv=0.02)) for _ in range(20)]
    assert 0.015 < np.median(floors) < 0.025  # of the true median of launches 1.2 %
    assert np.median(passed) > 1.3 * np.median(floors)
    assert comparison.floor_of(step_ms(rng, 9)) is None


# Ratio, low, high, and the verdict of 5 launches a side at a tolerance of 3 %; standard errors of 1 % at 8 degrees.
VERDICTS = [
    (1.0, 0.98, 1.02, "same"),
    (0.98, 0.971, 0.99, "same"),  # surely slower, and within the tolerance
    (0.98, 0.96, 1.0, "inconclusive"),
    (0.96, 0.94, 0.98, "inconclusive"),  # surely slower, and maybe within the tolerance
    (0.93, 0.91, 0.95, "regressed"),
    (1.07, 1.05, 1.09, "improved"),
    (1.07, 1.02, 1.12, "inconclusive"),
    (1.0, 0.9, 1.1, "inconclusive"),
]


@pytest.mark.parametrize(("median", "low", "high", "expected"), VERDICTS)
def test_a_verdict_is_where_the_interval_lies(median, low, high, expected):
    ratio = Ratio(median, low, high, error=0.01, freedom=8, p=None)
    assert comparison.verdicts([ratio], [5], 0.03) == [expected]
    assert comparison.verdicts([ratio], [2], 0.03) == ["inconclusive"]


def test_among_many_pairs_one_must_lie_further_beyond():
    near = Ratio(0.945, 0.925, 0.965, error=0.01, freedom=8, p=None)  # alone, its chance is 3 %
    equal = Ratio(1.0, 0.98, 1.02, error=0.01, freedom=8, p=None)
    assert comparison.verdicts([near], [5], 0.03) == ["regressed"]
    assert comparison.verdicts([near, equal, equal], [5] * 3, 0.03) == ["inconclusive", "same", "same"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write runs to compare: equal ones, a slow one, one of another machine, and one of other cases."""
    folder = tmp_path_factory.mktemp("runs")
    other = Case("mnist_cnn", replicas=2)
    old = {**ENV, "hash": "f", "versions": {"tensorflow": "2.20.0", "distloop": "0.1.0"}}
    rng = np.random.default_rng(3)
    for name, mean, env in [("base", 10, ENV), ("equal", 10, ENV), ("slow", 12, ENV), ("elsewhere", 10, old)]:
        recorder = records.Recorder(folder / name / "run.jsonl", name)
        recorder.write("env", **env)
        write(recorder, CASE, step_ms(rng, 10, windows=10, mean=mean), env=env)
        if name == "base":
            write(recorder, other, step_ms(rng, 3, windows=10))
    recorder = records.Recorder(folder / "other" / "run.jsonl", "other")
    recorder.write("env", **ENV)
    write(recorder, other, step_ms(rng, 3, windows=10))
    recorder = records.Recorder(folder / "failed" / "run.jsonl", "failed")
    recorder.write("env", **ENV)
    write(recorder, other, step_ms(rng, 3, windows=10))
    recorder.write("result", **results.summarize(CASE, [], env="e", error="no memory"))
    (folder / "twice").mkdir()
    for name in ("equal", "slow"):
        (folder / "twice" / f"{name}.jsonl").write_text((folder / name / "run.jsonl").read_text())
    (folder / "newer.jsonl").write_text('{"schema": "distloop.bench/2"}\n')
    return folder


def command(folder, *arguments):
    return harness.run("-m", "benchmarks.compare", *arguments, cwd=folder, COLUMNS="160")


def test_the_command_prints_a_table_and_exits_by_the_verdict(folder):
    code, out, err = command(folder, "base", "slow/run.jsonl", "--tolerance=0.05")
    assert (code, err) == (1, "")
    row = next(line for line in out.splitlines() if "mnist_cnn step, 1x1 replicas, batch 64" in line)
    assert row.split()[-1] == "regressed"
    assert "mnist_cnn step, 1x2 replicas, batch 64: only in BASE" in out
    assert "geometric mean" in out


def test_the_command_prints_json(folder):
    code, out, err = command(folder, "base", "equal", "--json", "--tolerance=0.05")
    found = json.loads(out)
    [pair] = found["pairs"]
    assert (code, found["exit_code"], err) == (2, 2, "")  # a case was not measured again
    assert (pair["verdict"], pair["case"], pair["launches"]) == ("same", CASE.to_dict(), [10, 10])
    assert pair["ratio"]["low"] < 1 < pair["ratio"]["high"]
    assert pair["memory_bytes"] == [2**30, 2**30]
    assert found["geometric_mean"]["median"] == pytest.approx(pair["ratio"]["median"])
    assert list(found["unmatched"].values()) == ["only in BASE"]
    assert 0 < found["floor"] < 0.05


def test_one_launch_a_side_has_no_verdict_and_valid_json(folder, tmp_path):
    for name in ("a", "b"):
        recorder = records.Recorder(tmp_path / name / "run.jsonl", name)
        recorder.write("env", **ENV)
        write(recorder, CASE, [[10.0, 10.0, 10.0]])
    code, out, err = command(tmp_path, "a", "b", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, err, found["pairs"][0]["verdict"]) == (2, "", "inconclusive")
    assert found["geometric_mean"] == {"median": 1.0, "low": 0.0, "high": None}


def test_a_run_in_which_all_has_failed_is_a_failure(folder, tmp_path):
    recorder = records.Recorder(tmp_path / "run.jsonl", "run")
    recorder.write("env", **ENV)
    recorder.write("result", **results.summarize(CASE, [], env="e", error="no memory"))
    code, out, _ = command(folder, "equal", str(tmp_path))
    assert code == 1
    assert "failed in NEW: no memory" in out


def test_the_floor_is_measured_from_one_run_and_a_tolerance_below_is_refused(folder):
    code, out, err = command(folder, "--aa", "base", "--tolerance=0.001")
    floor = comparison.machine_floor(map(comparison.floor_of, comparison.load(str(folder / "base")).steps.values()))
    assert f"Equal runs of so many launches differ by up to {floor:.2%} on this machine." in out
    assert (code, f"tolerance is 0.001, but equal runs differ by up to {floor:.2%}" in err) == (64, True)


def test_what_is_no_pair_of_runs_is_told_in_a_sentence(folder):
    code, out, err = command(folder, "base")
    sentence = "there are 1 arguments; expected BASE NEW: files or folders of records."
    assert (code, out, err) == (64, "", f"distloop: {sentence}\n")


def test_other_environments_are_compared_if_asked_to(folder):
    base, new = (comparison.load(str(folder / name)) for name in ("base", "elsewhere"))
    assert comparison.compare(base, new, 0.05, across=True)[0].verdict == "same"


def test_a_case_that_fails_in_the_new_run_is_told_and_no_success(folder):
    base, new = (comparison.load(str(folder / name)) for name in ("base", "failed"))
    assert comparison.unmatched(base, new) == {CASE.name: "failed in NEW: no memory"}
    pairs = comparison.compare(base, new, 0.5)
    assert compare.exit_code(base, new, pairs) == 1


@pytest.mark.parametrize(
    ("base", "new", "tolerance", "sentence"),
    [
        ("base", "elsewhere", 0.05, "the runs differ in tensorflow: 2.21.0 and 2.20.0; measure both alike, or give --"),
        (
            "slow",
            "other",
            0.05,
            "the runs have no case in common that both have measured; compare runs of one command.",
        ),
        ("base", "equal", 0.001, "tolerance is 0.001, but equal runs differ by up to "),
        ("base", "newer.jsonl", 0.05, "line 1 is of schema 'distloop.bench/2'; expected 'distloop.bench/1', as this"),
        (
            "base",
            "twice",
            0.05,
            "has two results of mnist_cnn step, 1x1 replicas, batch 64; expected one run: give its",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(folder, base, new, tolerance, sentence):
    with pytest.raises(UsageError) as error:
        comparison.compare(*(comparison.load(str(folder / name)) for name in (base, new)), tolerance)
    assert sentence in str(error.value)


def test_an_environment_holds_what_changes_speed_and_no_secret():
    variables = {"TF_XLA_FLAGS": "a", "NCCL_ALGO": "b", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}
    others = {"HOME": "h", "AWS_SECRET_ACCESS_KEY": "s", "TF_API_TOKEN": "s", "TF_VAR_password": "s", "TF_CONFIG": "{}"}
    assert environment.relevant({**variables, **others}) == dict(sorted(variables.items()))


def test_an_environment_is_that_of_this_machine_and_hashed(monkeypatch, tmp_path):
    found = environment.collect()
    records.Recorder(tmp_path / "a.jsonl", "r").write("env", **found)
    assert found == environment.collect()
    assert found["versions"]["tensorflow"].startswith("2.")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    changed = environment.collect()
    assert changed["hash"] != found["hash"]
    assert environment.differences(found, changed) == ["OMP_NUM_THREADS: None and 7"]
    newer = {**found, "versions": {**found["versions"], "distloop": "99"}}
    assert environment.differences(found, newer) == []
    assert all(isinstance(warning, str) for warning in environment.warnings())


def test_the_commit_is_that_of_the_sources():
    code, out, _ = harness.run("-c", "from benchmarks import environment; print(environment.commit()['commit'])")
    assert (code, len(out.strip())) == (0, 40)
