"""Results in the formats of others: MLPerf's log lines, tf_cnn_benchmarks' console lines, TensorBoard."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # its public `api` would load TensorFlow
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from benchmarks import results, statistics
from benchmarks.cases import from_dict

Record = Mapping[str, Any]


def mllog_lines(found: Sequence[Record]) -> Iterator[str]:
    """Yield the events of each launch as MLPerf's logging has them (github.com/mlcommons/logging).

    A window is a block with its `samples_count`. The end of a launch is the time of its record, and what came before
    is reckoned back from it: start-up and windows, without the warm-up between them. Each event names its record.
    """
    devices = {record["hash"]: record["hardware"]["device"] for record in found if record["kind"] == "env"}
    for run, windows in _launches(found):
        case = from_dict(run["case"])
        seconds = [step / 1e3 * steps for step, steps in windows]
        stop = 1e3 * datetime.fromisoformat(run["time"]).timestamp()
        start = stop - 1e3 * sum(seconds)
        startup = 1e3 * sum(run["facts"]["startup_s"].values())
        points = {
            "submission_benchmark": case.workload,
            "submission_platform": devices.get(run["env"]),
            "global_batch_size": case.global_batch,
            "gradient_accumulation_steps": case.settings.get("micro_batches", 1),
            "seed": run["seed"],
        }
        events = [(start - startup, "POINT_IN_TIME", key, value, {}) for key, value in points.items()]
        events += [(start - startup, "INTERVAL_START", "init_start", None, {})]
        events += [(start, "INTERVAL_END", "init_stop", None, {}), (start, "INTERVAL_START", "run_start", None, {})]
        for end, length, (_, steps) in zip(np.cumsum(seconds), seconds, windows, strict=True):
            about = {"samples_count": steps * case.global_batch}
            events += [(start + 1e3 * (end - length), "INTERVAL_START", "block_start", None, about)]
            events += [(start + 1e3 * end, "INTERVAL_END", "block_stop", None, about)]
        events += [(stop, "INTERVAL_END", "run_stop", None, {"status": "success"})]
        for time_ms, event_type, key, value, about in events:
            fields = {"namespace": "", "time_ms": round(time_ms), "event_type": event_type, "key": key, "value": value}
            place = {"file": run["file"], "lineno": run["line"]}
            yield f":::MLLOG {json.dumps({**fields, 'metadata': {**place, **about}})}"


def tf_cnn_logs(found: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yield the id of each launch and its log as tf_cnn_benchmarks prints it, a line a window; images are examples.

    As there: the mean over the windows so far, its standard error, and 1.4826 times the median absolute deviation.
    The loss is the last that was recorded, of one of the first steps.
    """
    for run, windows in _launches(found):
        case, losses = from_dict(run["case"]), run["facts"]["losses"]
        rates = np.array([1e3 * case.global_batch / step for step, _ in windows])
        steps = np.cumsum([steps for _, steps in windows])
        lines = [f"Model:       {_one_line(case.workload)}", f"Mode:        {case.mode}"]
        lines += [f"Batch size:  {case.global_batch} global", f"             {case.per_replica_batch} per device"]
        lines += [f"Num batches: {steps[-1]}", "Step\tImg/sec\ttotal_loss"]
        for index, step in enumerate(steps, 1):
            so_far = rates[:index]
            mean, error = 1 / np.mean(1 / so_far), np.std(so_far) / np.sqrt(index)
            speed = f"images/sec: {mean:.1f} +/- {error:.1f} (jitter = {statistics.jitter(so_far):.1f})"
            lines.append(f"{step}\t{speed}\t{losses[-1] if losses else np.nan:.3f}")
        total = steps[-1] * case.global_batch / sum(step / 1e3 * count for step, count in windows)
        lines += ["-" * 64, f"total images/sec: {total:.2f}", "-" * 64]
        yield _slug(run["launch"]), "\n".join(lines) + "\n"


def write_tensorboard(found: Sequence[Record], folder: Path) -> None:
    """Write scalars (their step is the number of replicas) and one HParams session for each result."""
    devices = {record["hash"]: record["hardware"]["device"] for record in found if record["kind"] == "env"}
    for result in (record for record in found if record["kind"] == "result"):
        case, seconds = result["case"], datetime.fromisoformat(result["time"]).timestamp()
        names = [case["workload"], case["mode"], case["peer"], f"{case['workers']}x{case['replicas']}", result["key"]]
        hparams = {
            name: case[name] for name in ("workload", "mode", "peer", "workers", "replicas", "per_replica_batch")
        }
        hparams["device"] = devices.get(result["env"], "")
        for name, value in case["settings"].items():
            hparams[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
        trial = f"{result['run']}/{result['key']}"
        summaries = [hparams_pb(hparams, trial_id=trial, start_time_secs=seconds)]
        summaries += [scalar_pb(name, value) for name, value in scalars(result).items()]
        step = case["workers"] * case["replicas"]
        events = [Event(wall_time=seconds, step=step, summary=summary) for summary in summaries]
        place = folder / _slug(result["run"]) / "-".join(map(_slug, names))
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"events.out.tfevents.{round(seconds)}.benchmarks").open("wb") as file:
            writer = RecordWriter(file)
            for event in [Event(wall_time=seconds, file_version="brain.Event:2"), *events]:
                writer.write(event.SerializeToString())


def scalars(result: Record) -> dict[str, float]:
    """Return what TensorBoard shows of a result, without what was not measured."""
    step, parts = result["step_ms"] or {}, result["breakdown_ms"] or {}
    wait, peak = parts.get("input_wait"), (result["memory"] or {}).get("device_peak_bytes")
    values = {
        "bench/throughput": (result["throughput"] or {}).get("median"),
        "bench/step_ms_p50": step.get("p50"),
        "bench/comm_exposed_ms": parts.get("comm_exposed"),
        "bench/input_wait_pct": None if wait is None else 100 * wait / step["median"],
        "bench/mfu": (result["flops"] or {}).get("mfu"),
        "memory/device_peak_gib": None if peak is None else peak / 2**30,
    }
    return {name: value for name, value in values.items() if value is not None}


def _launches(found: Sequence[Record]) -> Iterator[tuple[Record, list[tuple[float, int]]]]:
    """Yield the line of each launch, with milliseconds a step and steps of its windows, those of the slowest worker."""
    windows: dict[str, list[Record]] = {}
    for record in found:
        if record["kind"] == "window":
            windows.setdefault(record["launch"], []).append(record)
    for run in (record for record in found if record["kind"] == "run" and record["launch"] in windows):
        launch = results.Launch(run["launch"], run["facts"], windows[run["launch"]])
        steps = {window["index"]: window["steps"] for window in launch.windows}
        times = results.step_ms(from_dict(run["case"]), launch)
        yield run, list(zip(times, (steps[index] for index in sorted(steps)), strict=False))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _slug(text: str) -> str:
    """Return a text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text)[:60]
