"""What is written follows the schema and agrees with itself; what is read is told by file and line if it does not."""

import json

import numpy as np
import pytest

from benchmarks import records, results
from benchmarks.cases import Case
from benchmarks.peaks import Peak
from distloop.errors import UsageError

CASE = Case("mnist_cnn", workers=2, replicas=2, per_replica_batch=8)


def facts(case=CASE, **changes):
    return {
        "global_batch": case.global_batch,
        "params": 10,
        "gradient_bytes": {"dense": 40, "sparse": 0},
        "unit": "tokens",
        "units_per_example": 16,
        "flops_per_example": 1e6,
        "startup_s": {"import": 2.0, "first_step": 1.0},
        "memory": {"device_peak_bytes": None, "host_peak_bytes": 100},
        "losses": [2.0, 1.0],
        "warnings": [],
        **changes,
    }


def window(rank, index, step_ms, steps=10, wait_ms=0.0):
    """Return a window line's fields; times are of one step."""
    return {
        "launch": "a",
        "rank": rank,
        "index": index,
        "steps": steps,
        "seconds": steps * step_ms / 1e3,
        "input_wait_s": steps * wait_ms / 1e3,
        "host_gap_s": steps * 0.5 / 1e3,
    }


def launch(name, *rows, case=CASE, **changes):
    """Return a launch: a row of milliseconds a step for each rank."""
    windows = [window(rank, index, ms) for rank, row in enumerate(rows) for index, ms in enumerate(row)]
    return results.Launch(name, facts(case, **changes), windows)


LAUNCHES = [
    launch("a", [10.0, 12.0, 10.0], [11.0, 10.0, 14.0]),  # slowest: 11, 12, 14
    launch("b", [20.0, 20.0, 20.0], [10.0, 10.0, 10.0]),
    launch("c", [13.0, 13.0, 13.0], [13.0, 13.0, 13.0]),
]


def result(case=CASE, launches=LAUNCHES, **more):
    more = {"peak": Peak(1e12, "a table"), **more}
    return results.summarize(case, launches, env="e", **more)


def changed(fields, path, value):
    """Return a copy with the entry at a dotted path changed."""
    fields = json.loads(json.dumps(fields))
    *parents, last = path.split(".")
    place = fields
    for parent in parents:
        place = place[parent]
    place[last] = value
    return fields


def run_line(case=CASE, **more):
    return {
        **{"launch": "a", "index": 0, "key": case.key, "case": case.to_dict(), "argv": ["x"], "commit": None},
        **{"dirty": None, "seed": 0, "env": "e", "facts": facts(case), **more},
    }


POINT = {
    **{"launch": "a", "key": "k", "bytes": 1000, "tensors": 1, "replicas": 4, "hosts": 1, "algbw": 500.0},
    **{"seconds": {"median": 2.0, "low": 1.0, "high": 3.0, "launches": [2.0]}, "busbw": 750.0},
}


def test_what_is_written_is_read_again(tmp_path):
    recorder = records.Recorder(tmp_path / "runs" / "a.jsonl", "r")
    written = [
        recorder.write("run", **run_line()),
        recorder.write("window", **LAUNCHES[0].windows[0]),
        recorder.write("result", **result()),
        recorder.write("result", **results.summarize(CASE, [], env="e", error="it failed")),
        recorder.write("comm_point", **POINT),
    ]
    assert records.read([tmp_path / "runs", tmp_path / "runs" / "a.jsonl"]) == written


def test_a_result_says_what_was_planted():
    found = result(breakdown={"compute": 13.0, "comm_exposed": None})
    assert found["step_ms"]["median"] == pytest.approx(13, rel=1e-9)  # of 12, 20 and 13
    assert found["throughput"]["median"] == pytest.approx(32 * 16 / 13e-3, rel=1e-9)
    assert found["throughput"]["launches"] == pytest.approx([512 / 12e-3, 512 / 20e-3, 512 / 13e-3], rel=1e-9)
    assert found["throughput"]["low"] == pytest.approx(512 / (found["step_ms"]["high"] / 1e3), rel=1e-9)
    assert found["per_device"] == pytest.approx(512 / 13e-3 / 4, rel=1e-9)
    assert found["flops"]["mfu"] == pytest.approx(1e6 * 32 / 13e-3 / (4 * 1e12), rel=1e-9)
    slowest = [11, 12, 14, 20, 20, 20, 13, 13, 13]
    assert found["step_ms"]["mean"] == pytest.approx(np.mean(slowest), rel=1e-9)
    assert found["step_ms"]["p95"] == pytest.approx(np.percentile(slowest, 95), rel=1e-9)
    assert found["step_ms"]["cv"] == pytest.approx(np.std(slowest) / np.mean(slowest), rel=1e-9)
    # Persistent of the launches: 35/3 - 67/6, 20 - 15, 0; jitter: 37/3 - 35/3, 0, 0.
    assert found["skew_ms"] == pytest.approx({"persistent": 35 / 3 - 67 / 6, "jitter": 0}, rel=1e-9, abs=1e-9)
    assert found["memory"] == {"device_peak_bytes": None, "host_peak_bytes": 100}
    assert found["startup_s"] == {"import": 2, "first_step": 1}
    assert found["breakdown_ms"] == {"compute": 13, "comm_exposed": None}
    assert (found["unit"], found["params"], found["losses"], found["error"]) == ("tokens", 10, [2, 1], None)


def test_jitter_of_workers_is_what_is_lost_beyond_the_slowest():
    turns = launch("a", [10.0, 20.0], [20.0, 10.0])  # each is slow in turn
    assert result(launches=[turns])["skew_ms"] == pytest.approx({"persistent": 0, "jitter": 5}, rel=1e-9, abs=1e-9)


def test_parts_of_the_windows_are_a_step_of_the_slowest_worker():
    windows = [window(rank, index, 20.0, wait_ms=[1.0, 7.0][rank]) for rank in range(2) for index in range(3)]
    planted = [results.Launch("a", facts(), windows)]
    assert results.part_ms(CASE, planted, "input_wait_s") == pytest.approx(7, rel=1e-9)
    assert results.part_ms(CASE, planted, "host_gap_s") == pytest.approx(0.5, rel=1e-9)
    unmeasured = [results.Launch("a", facts(), [{**one, "input_wait_s": None} for one in windows])]
    assert results.part_ms(CASE, unmeasured, "input_wait_s") is None


def test_a_window_that_not_every_worker_has_ended_is_left_out():
    assert results.step_ms(CASE, launch("a", [10.0, 12.0, 90.0], [11.0, 10.0])) == pytest.approx([11, 12], rel=1e-9)


def test_startup_needs_no_windows():
    found = result(launches=[results.Launch("a", facts(), [])])
    assert (found["throughput"], found["step_ms"], found["flops"], found["skew_ms"]) == (None,) * 4
    assert found["startup_s"] == {"import": 2, "first_step": 1}


@pytest.mark.parametrize(
    ("launches", "message"),
    [
        ([launch("a", [1.0], [1.0]), launch("b", [1.0], [1.0], params=11)], "launch b has params 11, launch a 10"),
        ([launch("a", [1.0])], "launch a has no window of all 2 workers"),
        ([launch("a", [1.0], [1.0], [1.0])], "launch a has a window of rank 2; the case has 2"),
    ],
)
def test_launches_that_are_not_of_one_case_are_refused(launches, message):
    with pytest.raises(ValueError, match=message):
        result(launches=launches)


def test_warnings_of_launches_and_of_their_number_and_drift():
    drifts = launch("d", [10.0, 10.0, 12.0, 12.0], [10.0, 10.0, 12.0, 12.0], warnings=["busy"])
    assert result(launches=[drifts, drifts._replace(id="e")])["warnings"] == [
        "busy",
        "only 2 launches: the interval is too narrow; 5 give a 95 % one",
        "launch d is unsteady: its second half is +20% in step time",
        "launch e is unsteady: its second half is +20% in step time",
    ]


def scaled(**size):
    case = Case(**{**dict(workload="mnist_cnn", replicas=1, per_replica_batch=8), **size})
    rows = [[10.0 * case.workers * case.per_replica_batch / 8]] * case.workers
    return case, [launch("a", *rows, case=case)]


@pytest.mark.parametrize(
    ("size", "value", "kind"),
    [
        (dict(workers=2), 0.5, "weak"),  # steps twice as long, of twice as many examples
        (dict(workers=2, per_replica_batch=4), 0.5, "strong"),
    ],
)
def test_efficiency_is_relative_to_its_baseline(tmp_path, size, value, kind):
    base = result(*scaled())
    found = result(*scaled(**size), baseline=base)
    assert found["efficiency"] == {"value": pytest.approx(value, rel=1e-9), "baseline": base["key"], "kind": kind}
    recorder = records.Recorder(tmp_path / "a.jsonl", "r")
    with pytest.raises(ValueError, match=r"efficiency.baseline is .*, which has no result before it"):
        recorder.write("result", **found)
    recorder.write("result", **base)
    recorder.write("result", **found)
    with pytest.raises(ValueError, match=r"efficiency.value is 0.9; expected 0.5: throughput / ideal"):
        recorder.write("result", **changed(found, "efficiency.value", 0.9))
    other = "strong" if kind == "weak" else "weak"
    with pytest.raises(ValueError, match=f"that of the baseline, as scaling is {other}"):
        recorder.write("result", **changed(found, "efficiency.kind", other))


def test_efficiency_over_another_configuration_is_refused(tmp_path):
    recorder = records.Recorder(tmp_path / "a.jsonl", "r")
    base = recorder.write("result", **result(*scaled(settings={"jit_compile": True})))
    with pytest.raises(ValueError, match="is no point of the same scaling curve as"):
        recorder.write("result", **result(*scaled(workers=2), baseline=base))


@pytest.mark.parametrize(
    ("kind", "fields", "path", "value", "message"),
    [
        (
            "result",
            result(),
            "global_batch",
            31,
            "global_batch is 31; expected 32: 2 workers . 2 replicas . 8 examples",
        ),
        ("run", run_line(), "facts.global_batch", 64, "global_batch is 64; expected 32: 2 workers"),
        ("run", run_line(), "case.workers", 1, "key is .*; expected .*: the hash of the case"),
        ("result", result(), "flops.mfu", 1.2, r"flops.mfu: 1.2 is greater than the maximum of 1"),
        ("result", result(), "flops.mfu", 0.9, r"flops.mfu is 0.9; expected 0.000615385: FLOPs / peak"),
        ("result", result(), "throughput.median", 39000.0, "throughput.median is 39000.0; expected 39384.6: units"),
        ("result", result(), "per_device", 1.0, "per_device is 1.0; expected 9846.15: throughput / replicas"),
        ("result", result(), "breakdown_ms", {"compute": 9.0, "host_gap": 3.0}, "breakdown_ms is 12.0; expected 13: "),
        ("result", result(), "step_ms.low", 14.0, r"step_ms.median \(13\) is outside of its interval"),
        ("comm_point", POINT, "algbw", 400.0, "algbw is 400.0; expected 500: bytes / seconds"),
        ("comm_point", POINT, "busbw", 500.0, "busbw is 500.0; expected 750: "),
        ("result", result(), "losses", [float("nan")], "not JSON compliant"),
        ("result", result(), "env", None, r"\$.env: None is not of type 'string'"),
        ("lap", result(), "env", "e", r"\$.kind: 'lap' is not one of"),
    ],
)
def test_a_record_that_contradicts_itself_is_not_written(tmp_path, kind, fields, path, value, message):
    recorder = records.Recorder(tmp_path / "a.jsonl", "r")
    with pytest.raises(ValueError, match=message):
        recorder.write(kind, **changed(fields, path, value))
    assert not (tmp_path / "a.jsonl").exists()


GOOD = '{"schema": "distloop.bench/1", "kind": "verdict", "run": "r", "time": "2026-01-01T00:00:00Z", "key": "k", '
GOOD += '"bound": "input", "sentence": "s", "advice": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + GOOD[:60], "a.jsonl, line 2, the last, is cut off: the run was killed while it wrote; delete it."),
        (GOOD + GOOD[:60] + "\n" + GOOD, "a.jsonl, line 2 is no JSON; expected a record of distloop.bench/1."),
        (
            GOOD.replace("bench/1", "bench/2"),
            "a.jsonl, line 1 is of schema 'distloop.bench/2'; expected 'distloop.bench/1', as this version writes it.",
        ),
        ("3\n", "a.jsonl, line 1 is of schema None; expected 'distloop.bench/1', as this version writes it."),
        (
            GOOD.replace("2026-01-01", "today"),
            "a.jsonl, line 1 is no valid record: verdict: $.time: 'todayT00:00:00Z' is not a 'date-time'.",
        ),
    ],
)
def test_what_is_no_record_is_told_by_file_and_line(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UsageError) as error:
        records.read([tmp_path])
    assert str(error.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize("path", [".", "b.jsonl"])
def test_a_place_without_records_is_told(tmp_path, path):
    with pytest.raises(UsageError, match="holds no records; expected a file or a folder of"):
        records.read([tmp_path / path])


def test_ids_differ():
    assert len({records.new_id() for _ in range(100)}) == 100
