"""Whether a failed attempt is tried again, and when: a pure function of what has happened so far."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from distloop.errors import NotFiniteError, PreflightError, Stopped, UsageError

LONGEST_DELAY_SECS = 60.0
_FINAL = {
    UsageError.exit_code: "the same command would be refused again",
    NotFiniteError.exit_code: "the same command would diverge again",
    PreflightError.exit_code: "the machines cannot train together",
}


class Ending(NamedTuple):
    """Say how an attempt ended.

    `error` is the type and message of an exception, None for a death without one: a signal, a hang, a lost host.
    `begin` is the step after which the attempt began, `step` the last that it had done, both None if it did not begin.
    """

    code: int
    error: str | None = None
    begin: int | None = None
    step: int | None = None
    retry: bool = False  # for a reason that has gone with the attempt: a port that someone else took
    asked: bool = False  # a person or a scheduler had asked for the end


class Restart(NamedTuple):
    """Try again after `delay` seconds."""

    delay: float


class End(NamedTuple):
    """Give up; `why` is for a person, empty if there is nothing to explain."""

    why: str


def decide(history: Sequence[Ending], *, max_restarts: int) -> Restart | End:
    """Return what to do after the last attempt of `history`.

    Restarts are counted only while they make no progress: an attempt that begins at a later step than the one before
    shows that there was a new checkpoint, and the count starts again. The delays are 1, 2, 4 ... 60 s, a quarter more
    or less by chance.
    """
    last = history[-1]
    if last.code in (0, Stopped.exit_code) or last.asked:
        return End("")
    if last.code in _FINAL and not last.retry:
        return End(f"It is not restarted: {_FINAL[last.code]}.")
    if last.error and not last.retry and not any(_stepped(ending) for ending in history):
        return End("It is not restarted: the error came before the first step.")
    if len(history) > 1 and last.error and (last.error, last.step) == (history[-2].error, history[-2].step):
        return End("It is not restarted: the same error came at the same step twice.")
    fruitless = _fruitless(history)
    if fruitless > max_restarts:
        return End(
            f"It is not restarted: {fruitless} attempts in a row ended without a new checkpoint (--max_restarts)."
        )
    return Restart(min(LONGEST_DELAY_SECS, 2.0 ** (fruitless - 1)) * random.uniform(0.75, 1.25))


def _stepped(ending: Ending) -> bool:
    return ending.begin is not None and ending.step is not None and ending.step > ending.begin


def _fruitless(history: Sequence[Ending]) -> int:
    """Return how many attempts at the end of the history began no later than the first of them did."""
    count, begin = 1, history[-1].begin
    for ending in reversed(history[:-1]):
        if begin is not None and ending.begin is not None and ending.begin < begin:
            break
        begin = ending.begin if ending.begin is not None else begin
        count += 1
    return count
