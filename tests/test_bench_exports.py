"""What is written in the formats of others is read back as others read it."""

import json
import re
from datetime import datetime

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from benchmarks import exports
from benchmarks.cases import Case
from tests import bench_records

# How parsers that are in use read the console of tf_cnn_benchmarks: PerfKitBenchmarker the total, others the lines.
TOTAL = re.compile(r"total images/sec: (\S+)")
STEP = re.compile(r"^(\d+)\timages/sec: ([\d.]+) \+/- ([\d.]+) \(jitter = ([\d.]+)\)\t([\d.]+)$", re.MULTILINE)
# Of mlperf_logging/mllog/constants.py of mlcommons/logging, version 4.1.
MLLOG_INTERVALS = {"init_start": "init_stop", "run_start": "run_stop", "block_start": "block_stop"}
MLLOG_POINTS = {
    *("submission_benchmark", "submission_platform", "global_batch_size", "gradient_accumulation_steps", "seed"),
}


@pytest.fixture
def found():
    """Two workers, the second one slower, and what else an invocation writes; each with its place in a file."""
    case = Case("resnet50", workers=2, replicas=4, per_replica_batch=128, settings={"micro_batches": 2})
    lines = [bench_records.env(), *bench_records.launches_of(case, step_s=0.1)]
    for line in lines:
        if line["kind"] == "window" and line["rank"] == 1:
            line["seconds"] *= 1.25
    lines.append(bench_records.result(case, 8000.0, comm=5.0, input_wait=16.0))
    return [{**line, "file": "a.jsonl", "line": number} for number, line in enumerate(lines, 1)]


def slowest_seconds(found, launch):
    """Return the seconds of the windows of a launch; all have 10 steps, and rank 1 is the slower."""
    return [r["seconds"] for r in found if r["kind"] == "window" and r["launch"] == launch and r["rank"] == 1]


def test_mllog_lines_are_events_of_the_published_form(found):
    prefix = ":::MLLOG "
    lines = list(exports.mllog_lines(found))
    assert all(line.startswith(prefix) and "\n" not in line for line in lines)
    events = [json.loads(line.removeprefix(prefix)) for line in lines]
    for event in events:
        assert list(event) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
        assert isinstance(event["time_ms"], int)
        kind = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}.get(event["key"].split("_")[-1], "POINT_IN_TIME")
        assert event["event_type"] == kind
        assert event["key"] in MLLOG_POINTS | set(MLLOG_INTERVALS) | set(MLLOG_INTERVALS.values())
        record = found[event["metadata"]["lineno"] - 1]
        assert (record["kind"], record["file"]) == ("run", event["metadata"]["file"])
    values = {event["key"]: event["value"] for event in events if event["event_type"] == "POINT_IN_TIME"}
    assert values == dict(
        submission_benchmark="resnet50",
        submission_platform="NVIDIA H200",
        global_batch_size=1024,
        gradient_accumulation_steps=2,
        seed=7,
    )


def test_mllog_intervals_have_the_lengths_that_were_measured(found):
    events = [json.loads(line[len(":::MLLOG ") :]) for line in exports.mllog_lines(found)]
    runs = [record for record in found if record["kind"] == "run"]
    of_launch = len(events) // len(runs)
    for run, begin in zip(runs, range(0, len(events), of_launch), strict=True):
        own = events[begin : begin + of_launch]
        assert [event["time_ms"] for event in own] == sorted(event["time_ms"] for event in own)
        lengths = {start: [] for start in MLLOG_INTERVALS}
        for start, stop in MLLOG_INTERVALS.items():
            ends = [[event["time_ms"] for event in own if event["key"] == key] for key in (start, stop)]
            lengths[start] = [end - begin for begin, end in zip(*ends, strict=True)]
        seconds = slowest_seconds(found, run["launch"])
        assert lengths["block_start"] == pytest.approx([1e3 * each for each in seconds], abs=2)
        assert lengths["run_start"] == pytest.approx([1e3 * sum(seconds)], abs=2)
        assert lengths["init_start"] == pytest.approx([1e3 * sum(run["facts"]["startup_s"].values())], abs=2)
        assert {event["metadata"].get("samples_count") for event in own} == {None, 10 * 1024}
        assert own[-1]["metadata"]["status"] == "success"
        assert own[-1]["time_ms"] == round(1e3 * datetime.fromisoformat(run["time"]).timestamp())


def test_tf_cnn_lines_are_read_by_the_parsers_that_are_in_use(found):
    logs = dict(exports.tf_cnn_logs(found))
    assert len(logs) == 3
    for run in (record for record in found if record["kind"] == "run"):
        log = logs[run["launch"]]
        seconds = np.array(slowest_seconds(found, run["launch"]))
        rates = 10 * 1024 / seconds
        assert [float(total) for total in TOTAL.findall(log)] == [pytest.approx(40 * 1024 / seconds.sum(), abs=0.01)]
        steps = STEP.findall(log)
        assert [int(step) for step, *_ in steps] == [10, 20, 30, 40]
        for count, (_, mean, error, jitter, loss) in enumerate(steps, 1):
            so_far = rates[:count]
            deviation = 1.4826 * np.median(np.abs(so_far - np.median(so_far)))
            expected = (10 * 1024 * count / seconds[:count].sum(), so_far.std() / count**0.5, deviation, 2.25)
            shown = [float(text) for text in (mean, error, jitter, loss)]
            assert shown == pytest.approx(expected, abs=0.051)


def read_back(folder):
    """Return the scalars and the hyperparameters of each run folder, by TensorBoard's own readers."""
    runs = {}
    for place in {file.parent for file in folder.rglob("events*")}:
        events = EventAccumulator(str(place)).Reload()
        scalars = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if not tag.startswith("_hparams_")}
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        session = metadata.parse_session_start_info_plugin_data(content)
        values = {tag: (event.step, event.tensor_proto.float_val[0]) for tag, (event,) in scalars.items()}
        hparams = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
        runs[place.name] = (values, hparams, session.group_name)
    return runs


def test_tensorboard_reads_scalars_and_one_session_a_result(found, tmp_path):
    exports.write_tensorboard(found, tmp_path)
    ((values, hparams, group),) = read_back(tmp_path).values()
    step = 1000 * 1024 / 8000
    expected = {
        "bench/throughput": 8000.0,
        "bench/step_ms_p50": step,
        "bench/comm_exposed_ms": 5.0,
        "bench/input_wait_pct": 100 * 16 / step,
        "bench/mfu": 24.6e9 * 8000 / 8 / 989e12,
        "memory/device_peak_gib": 9.0,
    }
    assert values == {name: (8, pytest.approx(value)) for name, value in expected.items()}
    assert hparams == dict(
        **dict(workload="resnet50", mode="step", peer="distloop", workers=2, replicas=4, per_replica_batch=128),
        **dict(micro_batches=2, device="NVIDIA H200"),
    )
    assert group.startswith("run1/")


def test_tensorboard_has_no_value_of_what_was_not_measured(tmp_path):
    cases = [Case("a/../../b", settings={"data_dir": None}), Case("a", peer="orbit")]
    lines = [bench_records.env(), bench_records.failed(cases[1], "no orbit")]
    lines.append(bench_records.result(cases[0], 10.0, breakdown_ms=None, flops=None, memory=None))
    exports.write_tensorboard(lines, tmp_path / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    runs = read_back(tmp_path)
    shown = {hparams["peer"]: set(values) for values, hparams, _ in runs.values()}
    assert shown == {"distloop": {"bench/throughput", "bench/step_ms_p50"}, "orbit": set()}
    exports.write_tensorboard(lines, tmp_path / "inside")
    assert read_back(tmp_path) == runs, "written again, they are there once"
