"""Launch all cases in turn, A B A B, write down all that is found, and conclude what it means."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import breakdown, curves, environment, modes, peaks, peers, records, results, statistics
from benchmarks.cases import Case
from benchmarks.launches import Failed, Hosts, launch
from benchmarks.modes import Wanted
from benchmarks.timing import Timing
from distloop.errors import UsageError


class Asked(NamedTuple):
    """Say how cases are launched."""

    launches: int
    timing: Timing
    hosts: Hosts
    folder: Path  # for what launches leave
    limit_secs: float  # of one launch
    argv: Sequence[str]  # the command that measures all this again


def run(
    wanted: Sequence[Wanted], recorder: records.Recorder, asked: Asked, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure; return the result lines, those of the cases that only split a step among them.

    A case that fails is not launched again; its result holds the error. `show` gets a line for each launch. Raises
    UsageError for what the user can mend, unless it is a peer that does not have what the case asks for.
    """
    env = environment.collect()
    warnings = environment.warnings()
    recorder.write("env", **env, warnings=warnings)
    for warning in warnings:
        show(f"mind that {warning}")
    done: dict[str, list[results.Launch]] = {case.key: [] for case in modes.unique(wanted)}
    failed: dict[str, Failed] = {}
    try:
        _launch_all(wanted, recorder, asked, show, env["hash"], done, failed)
    except BaseException:
        if any(done.values()):  # what was measured until then is not lost
            _conclude_all(wanted, done, failed, recorder, env)
        raise
    return _conclude_all(wanted, done, failed, recorder, env)


def _launch_all(
    wanted: Sequence[Wanted],
    recorder: records.Recorder,
    asked: Asked,
    show: Callable[[str], None],
    env: str,
    done: dict[str, list[results.Launch]],
    failed: dict[str, Failed],
) -> None:
    """Fill `done` and `failed`, by the keys of the cases."""
    for index in range(asked.launches):
        for case in (case for case in modes.unique(wanted) if case.key not in failed):
            began = time.perf_counter()
            folder = asked.folder / f"{case.key}_{index}"
            found = launch(case, asked.timing, asked.hosts, folder, limit_secs=asked.limit_secs)
            if isinstance(found, Failed):
                if found.exit_code == UsageError.exit_code and case.peer == "distloop" and not any(done.values()):
                    raise UsageError(found.error)
                failed[case.key] = found
                show(f"{case.name}: {found.error}")
                continue
            done[case.key].append(found)
            _write_launch(recorder, asked.argv, case, index, found, env)
            step = np.median(results.step_ms(case, found))
            seconds = time.perf_counter() - began
            show(f"{case.name}: launch {index + 1} of {asked.launches}: {step:.4g} ms a step ({seconds:.0f} s)")


def _conclude_all(
    wanted: Sequence[Wanted],
    done: Mapping[str, Sequence[results.Launch]],
    failed: Mapping[str, Failed],
    recorder: records.Recorder,
    env: Mapping[str, Any],
) -> list[dict[str, Any]]:
    launches = {key: list(found) for key, found in done.items()}
    errors = {key: found.error for key, found in failed.items()}
    errors |= _who_does_something_else(modes.unique(wanted), launches)
    return conclude(wanted, launches, errors, recorder, env)


def _who_does_something_else(all_cases: Sequence[Case], launches: dict[str, list[results.Launch]]) -> dict[str, str]:
    """Return a sentence for each peer whose losses are not the first one's, by the key of its case; drop its launches.

    The first one also says what FLOPs an example takes, for all of them: they compute the same.
    """
    found = {}
    first: dict[str, Case] = {}
    for case in (case for case in all_cases if launches[case.key]):
        reference = first.setdefault(replace(case, peer="distloop").key, case)
        if reference == case:
            continue
        facts = [launches[one.key][0].facts for one in (reference, case)]
        losses = [[math.nan if loss is None else loss for loss in fact["losses"]] for fact in facts]
        precision = str(case.settings.get("precision", "float32"))
        differences = peers.differences(dict(zip((reference.peer, case.peer), losses, strict=True)), precision)
        if differences:
            found[case.key] = differences[0]
            launches[case.key] = []
        flops = {"flops_per_example": facts[0]["flops_per_example"]}
        launches[case.key] = [one._replace(facts={**one.facts, **flops}) for one in launches[case.key]]
    return found


def _write_launch(
    recorder: records.Recorder, argv: Sequence[str], case: Case, index: int, found: results.Launch, env: str
) -> None:
    recorder.write(
        "run",
        launch=found.id,
        index=index,
        key=case.key,
        case=case.to_dict(),
        argv=list(argv),
        seed=case.settings.get("seed", 0),
        env=env,
        facts=dict(found.facts),
        **environment.commit(),
    )
    for window in found.windows:
        recorder.write("window", launch=found.id, **window)


def conclude(
    wanted: Sequence[Wanted],
    launches: Mapping[str, Sequence[results.Launch]],
    errors: Mapping[str, str],
    recorder: records.Recorder,
    env: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Write and return the results, each after what it is relative to, and write what they mean.

    `launches` and `errors` are by the key of the case, `env` the fields of the env line.
    """
    written: dict[str, dict[str, Any]] = {}
    points: list[dict[str, Any]] = []

    def summarize(case: Case, one: Wanted | None = None) -> None:
        """Write the result of a case; `one` says what it was split by and is relative to."""
        if case.key in written:
            return
        found, baseline, parts = launches[case.key], None, None
        if one is not None:
            baseline = written.get(one.baseline.key) if one.baseline else None
            parts = _parts(one, launches, written)
        try:
            fields = results.summarize(
                case,
                found,
                env=env["hash"],
                peak=_peak(case, found),
                baseline=baseline,
                breakdown=parts,
                error=errors.get(case.key),
            )
            alone = one and written.get(one.without["nocomm"].key) if one and "nocomm" in one.without else None
            if alone:  # in the step itself all wait for the slowest
                fields["skew_ms"] = alone["skew_ms"]
            written[case.key] = recorder.write("result", **fields)
        except ValueError as error:  # its launches contradict each other: no reason to lose the others'
            fields = results.summarize(case, [], env=env["hash"], error=str(error))
            written[case.key] = recorder.write("result", **fields)

    for one in sorted(wanted, key=lambda one: one.baseline is not None):
        for companion in one.without.values():
            summarize(companion)
        summarize(one.case, one)
        result = written[one.case.key]
        verdict = breakdown.judge(result)
        if verdict:
            recorder.write("verdict", key=one.case.key, **verdict._asdict())
        if one.case.mode == "comm" and launches[one.case.key]:
            points.append(recorder.write("comm_point", **_exchange(one.case, launches[one.case.key])))
    for fit in (*curves.of_sweeps(records.read([recorder.path])), *curves.of_all_reduces(points)):
        recorder.write("fit", **fit)
    return list(written.values())


def _peak(case: Case, found: Sequence[results.Launch]) -> peaks.Peak | None:
    """Return the peak of the device that the launches ran on, if it is known and one and the same."""
    names = {name for launch in found for name in launch.facts["devices"]}
    if len(names) != 1:
        return None
    precision = str(case.settings.get("precision", "float32"))
    return peaks.find(names.pop(), precision, tf32=all(launch.facts["tf32"] for launch in found))


def _parts(
    one: Wanted, launches: Mapping[str, Sequence[results.Launch]], written: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None] | None:
    """Return the breakdown of a step, if its parts were measured."""
    found = launches[one.case.key]
    if one.case.mode not in modes.SPLIT or one.case.peer != "distloop" or not found:
        return None

    def step_ms(case: Case | None) -> float | None:
        result = case and written.get(case.key)
        return result["step_ms"]["median"] if result and result["step_ms"] else None

    step = statistics.interval([results.step_ms(one.case, launch) for launch in found]).median
    gap = results.part_ms(one.case, found, "host_gap_s") or 0.0
    overheads = [launch.facts["call_overhead_s"] for launch in found]
    if None not in overheads:
        calls = float(np.median([launch.facts["calls_per_step"] for launch in found]))
        gap += 1e3 * float(np.median(overheads)) * calls
    others = {
        part: results.part_ms(one.case, found, f"{part}_s") for part in ("eval", "save") if one.case.mode == "e2e"
    }
    return breakdown.split(
        step,
        others=others,
        input_wait_ms=results.part_ms(one.case, found, "input_wait_s"),
        host_gap_ms=gap,
        resident_ms=step if one.case.mode == "step" else step_ms(one.without.get("step")),
        without_reduction_ms=step_ms(one.without.get("nocomm")),
        without_update_ms=step_ms(one.without.get("noupdate")),
    )


def _exchange(case: Case, launches: Sequence[results.Launch]) -> dict[str, Any]:
    """Return the fields of a comm_point: how long the replicas take to sum what has the size of the gradients."""
    facts = launches[0].facts
    size = facts["gradient_bytes"]["dense"] + facts["gradient_bytes"]["sparse"]
    seconds = statistics.interval([[ms / 1e3 for ms in results.step_ms(case, launch)] for launch in launches])
    replicas = case.total_replicas
    return {
        "launch": launches[0].id,
        "key": case.key,
        "what": "sweep" if case.workload == "null" else case.workload,
        "bytes": size,
        "tensors": facts["gradient_tensors"],
        "replicas": replicas,
        "hosts": facts["hosts"],
        "seconds": seconds.to_dict(),
        "algbw": size / seconds.median,
        "busbw": size / seconds.median * 2 * (replicas - 1) / replicas,
    }
