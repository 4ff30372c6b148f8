"""Faults for rehearsals, as `--fault=rank:step:kind` names them. Imports no TensorFlow."""

from typing import NamedTuple

from distloop.config import UsageError

KINDS = ("kill", "stop", "hang", "raise", "exit0", "nan", "enospc", "torn_save")


class Fault(NamedTuple):
    """Say what goes wrong on which worker in which training step, of which 1 is the first."""

    rank: int
    step: int
    kind: str


def parse_faults(text: str) -> list[Fault]:
    """Read `rank:step:kind[,rank:step:kind...]`, the first for the first attempt and so on. Raises UsageError."""
    faults = []
    for part in filter(None, text.split(",")):
        rank, step, kind = (part.split(":") + ["", ""])[:3]
        if not (rank.isdecimal() and step.isdecimal() and int(step) > 0 and kind in KINDS):
            raise UsageError(
                f"fault has {part!r}; expected RANK:STEP:KIND, such as 1:20:kill, with one of {', '.join(KINDS)}."
            )
        faults.append(Fault(int(rank), int(step), kind))
    return faults
