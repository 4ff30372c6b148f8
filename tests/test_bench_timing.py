"""What is told of a step's time, on a clock of its own with planted delays: windows, split, verdict."""

import itertools
from dataclasses import dataclass, replace

import pytest

from benchmarks import breakdown, modes, records, results, runner, timing

ENV = {
    "hash": "e",
    "versions": {"python": "3"},
    "hardware": {"device": "CPU", "devices": 0, "cpu": "c", "cores": 2, "memory_bytes": 1},
    "environment": {},
}


@dataclass
class Machine:
    """One worker on its own clock; seconds a step of each part, and of each call."""

    compute: float = 0.010
    comm: float = 0.002
    optimizer: float = 0.001
    input_wait: float = 0.0
    in_call: float = 0.0001  # whatever the length of the call
    between_calls: float = 0.00005
    now: float = 0.0

    def clock(self):
        return self.now

    def caller(self, mode):
        step = self.compute + self.input_wait
        step += {"step": self.comm + self.optimizer, "nocomm": self.optimizer, "noupdate": 0.0}[mode]

        def call(num_steps):
            seconds = self.in_call + num_steps * step
            self.now += self.between_calls + seconds
            return timing.Called(seconds, num_steps * self.input_wait)

        return call


def measure(case, machines, windows=20):
    """Return the launch that these workers make of a case; the slowest decides what a window is."""
    found, slowest = [], max(machines, key=lambda machine: machine.compute)
    if case.mode == "step":  # the reduction makes all wait for the slowest
        machines = [replace(machine, compute=slowest.compute) for machine in machines]
    call = slowest.caller(case.mode)
    plan = timing.warm_up(
        call, timing.Timing(), steps_per_call=case.settings.get("steps_per_call", 50), clock=slowest.clock
    )
    for rank, machine in enumerate(machines):
        made = timing.windows(
            machine.caller(case.mode), call_steps=plan.call_steps, calls=plan.calls, count=windows, clock=machine.clock
        )
        found += [{"rank": rank, **window} for window in made]
    facts = {
        "global_batch": case.global_batch,
        "params": 10,
        "gradient_bytes": {"dense": 40, "sparse": 0},
        "unit": "examples",
        "units_per_example": 1,
        "flops_per_example": None,
        "startup_s": {},
        "memory": {"device_peak_bytes": None, "host_peak_bytes": 1},
        "losses": [],
        "warnings": [],
        "call_overhead_s": plan.overhead_secs,
        "calls_per_step": 1 / plan.call_steps,
        "devices": [],
        "tf32": True,
        "hosts": 1,
    }
    return results.Launch(f"{case.key}", facts, found)


def conclude(tmp_path, machines, *, workers=1, **settings):
    """Return result, breakdown and verdict of a step with these machines, as the records have them."""
    replicas = 2 // workers
    (wanted,) = modes.plan("step", "null", sizes=[(workers, replicas)], batch=64, settings=settings)
    launches = {case.key: [measure(case, machines)] for case in wanted.all}
    recorder = records.Recorder(tmp_path / "r.jsonl", "run")
    found = runner.conclude([wanted], launches, {}, recorder, ENV)
    (verdict,) = [line for line in records.read([tmp_path / "r.jsonl"]) if line["kind"] == "verdict"]
    return found[-1], found[-1]["breakdown_ms"], verdict


PLANTED = [
    ("compute", {}, {}),
    ("input", {"input_wait": 0.050}, {}),
    ("communication", {"comm": 0.030}, {}),
    ("optimizer", {"optimizer": 0.008}, {}),
    ("launch", {"in_call": 0.020, "between_calls": 0.004}, {"steps_per_call": 1}),
]


@pytest.mark.parametrize(("bound", "delays", "settings"), PLANTED, ids=[planted[0] for planted in PLANTED])
def test_a_planted_delay_is_found_and_its_part_is_right_to_5_percent(tmp_path, bound, delays, settings):
    machine = replace(Machine(), **delays)
    result, parts, verdict = conclude(tmp_path, [machine], **settings)
    assert verdict["bound"] == bound
    seconds = {
        "compute": machine.compute,
        "comm_exposed": machine.comm,
        "optimizer": machine.optimizer,
        "input_wait": machine.input_wait,
    }
    if settings:  # else a call is many steps, and its costs are lost in them
        seconds["host_gap"] = machine.in_call + machine.between_calls
    whole = result["step_ms"]["median"]
    for name, value in seconds.items():
        assert parts[name] == pytest.approx(1e3 * value, rel=0.05, abs=0.002 * whole), name
    assert sum(parts.values()) == pytest.approx(whole)


def test_a_slow_worker_is_found(tmp_path):
    result, _, verdict = conclude(tmp_path, [Machine(), Machine(compute=0.030)], workers=2)
    assert verdict["bound"] == "skew"
    assert result["skew_ms"]["persistent"] == pytest.approx(10, rel=0.05)  # 20 ms more than the other: 10 than the mean
    assert result["step_ms"]["median"] == pytest.approx(33, rel=0.05)  # the slowest worker counts


def test_steps_that_differ_wildly_get_no_other_verdict(tmp_path):
    step = {"median": 10.0, "low": 4.0, "high": 17.0}
    parts = {"compute": 5.0, "input_wait": 5.0}
    assert breakdown.judge({"breakdown_ms": parts, "step_ms": step, "skew_ms": None}).bound == "unsteady"


def test_a_result_without_breakdown_gets_no_verdict():
    assert breakdown.judge({"breakdown_ms": None, "step_ms": {"median": 1.0}, "skew_ms": None}) is None


@pytest.mark.parametrize("step_secs", [1e-5, 1e-3, 0.1, 3.0])
def test_windows_are_long_enough_and_calls_no_longer_than_they_must(step_secs):
    machine = Machine(compute=step_secs, comm=0, optimizer=0, in_call=0, between_calls=0)
    plan = timing.warm_up(machine.caller("noupdate"), timing.Timing(), steps_per_call=50, clock=machine.clock)
    window = plan.calls * plan.call_steps * step_secs
    assert 0.25 <= window + 1e-9 <= max(0.25 + 50 * step_secs, step_secs)
    assert plan.call_steps <= 50
    assert plan.steady


def test_a_warm_up_that_does_not_become_steady_ends_and_says_so():
    machine, noise = Machine(), itertools.cycle([0.5, 1.0])
    steady = machine.caller("step")

    def call(num_steps):
        machine.now += next(noise)
        return steady(num_steps)

    plan = timing.warm_up(call, timing.Timing(warmup_secs=10), steps_per_call=50, clock=machine.clock)
    assert not plan.steady


def test_windows_leave_no_time_out():
    machine = Machine()
    began = machine.now
    found = list(timing.windows(machine.caller("step"), call_steps=10, calls=3, count=7, clock=machine.clock))
    assert sum(window["seconds"] for window in found) == pytest.approx(machine.now - began)
    assert {window["steps"] for window in found} == {30}
    assert found[0]["host_gap_s"] == pytest.approx(3 * machine.between_calls)
