"""Where a step's time goes, by measurement: each part is a time that was taken, or a difference of two.

step = compute + exposed communication + optimizer + input wait + host gap

- exposed communication: the step less the step without its reduction (tf_cnn_benchmarks' `independent`), so what
  overlaps with the backward pass does not count;
- optimizer: the step without reduction less the one that applies no gradient either;
- input wait: what the replicas waited for their batches, taken within the step;
- host gap: what lies between compiled calls, and what a call costs whatever its length;
- evaluation and save, end to end: what the loop waited for these;
- compute: the rest.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# The largest part other than compute is what a step is bound by if it is more than this share of the step.
_MATTERS = 0.2


class Verdict(NamedTuple):
    """Say what bounds a case, in a sentence, and the next thing to try."""

    bound: str
    sentence: str
    advice: str


_BOUNDS = {
    "compute": (
        "compute",
        "compute-bound",
        "a larger batch fills the device better; try --precision=mixed_bfloat16 and --jit_compile (--mode=ablate)",
    ),
    "comm_exposed": (
        "communication",
        "communication-bound",
        "a larger batch a replica or --micro_batches exchanges less often; see --mode=comm for what the links give",
    ),
    "optimizer": ("optimizer", "optimizer-bound", "a larger batch or --micro_batches updates less often"),
    "input_wait": (
        "input",
        "input-bound",
        "see --mode=input for what the pipeline gives; on_disk() for what is read again, --data_service for more hosts",
    ),
    "eval": ("evaluation", "held up by evaluations", "evaluate less often with --eval_every_steps"),
    "save": ("checkpoint", "held up by checkpoints", "save less often with --checkpoint_every_steps"),
    "host_gap": ("launch", "launch-bound", "run more steps in a call with --steps_per_call"),
}


def split(
    step_ms: float,
    *,
    input_wait_ms: float | None,
    host_gap_ms: float,
    resident_ms: float | None,
    without_reduction_ms: float | None,
    without_update_ms: float | None,
    others: Mapping[str, float | None] | None = None,
) -> dict[str, float | None]:
    """Return the milliseconds of each part; None where it was not measured, which is then in `compute`.

    `resident_ms` is the step on a batch that lies on the device, as the two are that leave something out. Noise can
    make a difference negative; it is then 0. The parts add up to `step_ms`.
    """
    parts: dict[str, float | None] = {"input_wait": input_wait_ms, "host_gap": host_gap_ms, **(others or {})}
    parts["comm_exposed"] = _less(resident_ms, without_reduction_ms)
    parts["optimizer"] = _less(without_reduction_ms or resident_ms, without_update_ms)
    known = sum(value for value in parts.values() if value is not None)
    shrink = min(1.0, step_ms / known) if known else 1.0
    measured = {name: None if value is None else value * shrink for name, value in parts.items()}
    return {"compute": step_ms - known * shrink, **measured}


def _less(whole: float | None, without: float | None) -> float | None:
    return None if whole is None or without is None else max(0.0, whole - without)


def judge(result: Mapping[str, Any]) -> Verdict | None:
    """Return what bounds a result; None if that was not measured."""
    parts, step = result["breakdown_ms"], result["step_ms"]
    if parts is None or step is None:
        return None
    whole = step["median"]
    skew = (result["skew_ms"] or {}).get("persistent", 0.0)
    shares = {name: value for name, value in parts.items() if name != "compute" and value is not None}
    name = max(shares, key=shares.__getitem__, default="compute")
    if (step["high"] - step["low"]) > whole:
        return Verdict(
            "unsteady",
            f"too unsteady to tell: a step takes {step['low']:.3g} to {step['high']:.3g} ms",
            "measure on a machine that does nothing else, with more --launches",
        )
    if skew > max(_MATTERS * whole, shares.get(name, 0.0) / 2):
        return Verdict(
            "skew",
            f"held up by a slow worker: it takes {skew:.3g} ms of {whole:.3g} ms longer than the mean",
            "look at that worker's host: its clock, its other processes, its share of the data",
        )
    if shares.get(name, 0.0) < _MATTERS * whole:
        name = "compute"
    if name == "compute" and parts["optimizer"] is None:
        return None  # what else is in it was not measured
    bound, word, advice = _BOUNDS[name]
    return Verdict(bound, f"{word}: {parts[name]:.3g} of {whole:.3g} ms a step", advice)
