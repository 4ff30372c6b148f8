"""Faults for rehearsals, as `--fault=rank:step:kind` names them. Imports no TensorFlow."""

from collections.abc import Sequence
from typing import NamedTuple

from distloop.errors import UsageError

VARIABLE = "DISTLOOP_FAULT"  # tells one worker of its fault, as step:kind
KINDS = ("kill", "stop", "hang", "raise", "exit0", "nan", "enospc", "torn_save")


class Fault(NamedTuple):
    """Say what goes wrong on which worker in which training step, of which 1 is the first."""

    rank: int
    step: int
    kind: str


def parse_faults(text: str) -> list[Fault]:
    """Read `rank:step:kind[,rank:step:kind...]`, the first for the first attempt and so on. Raises UsageError."""
    return [
        _fault(*part.split(":", 1), refusal=f"fault has {part!r}; expected RANK:STEP:KIND, such as 1:20:kill")
        for part in filter(None, text.split(","))
    ]


def check_ranks(faults: Sequence[Fault], *, workers: int) -> None:
    """Raise UsageError for a fault of a worker that there is not."""
    for fault in faults:
        if fault.rank >= workers:
            raise UsageError(f"fault is for rank {fault.rank}, but the run has {workers} worker(s), numbered from 0.")


def parse_own_fault(text: str) -> Fault:
    """Read `step:kind`, the value of the variable. Raises UsageError."""
    return _fault("0", text, refusal=f"{VARIABLE} has {text!r}; expected STEP:KIND, such as 20:kill")


def _fault(rank: str, rest: str = "", *, refusal: str) -> Fault:
    step, _, kind = rest.partition(":")
    if not (rank.isdecimal() and step.isdecimal() and int(step) > 0 and kind in KINDS):
        raise UsageError(f"{refusal}, with one of {', '.join(KINDS)}.")
    return Fault(int(rank), int(step), kind)
