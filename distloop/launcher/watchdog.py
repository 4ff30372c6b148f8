"""When workers that say nothing new have hung: limits for each phase, learned from the run. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import final

from distloop.errors import UsageError
from distloop.launcher.beacon import PHASES, Sighting

# Seconds without progress. What is normal is learned: the limit is 5 times the longest seen, and at least this. Long
# where a healthy run shows no progress: as it prepares data, compiles, saves, or in what the user has added. Of a
# program that is not distloop's nothing is known (`import`).
FLOORS = {
    "import": math.inf,
    "setup": 3600,
    "compile": 3600,
    "step": 120,
    "input": 600,
    "eval": 600,
    "save": 3600,
    "action": 3600,
    "end": 4000,
}
_TIMES_LONGEST = 5
_TIMES_COMPILE = 2  # a step is as long as the first one at most, which was compiled, too
# While one worker is here, the others wait for it.
_OTHERS_WAIT_FOR = ("compile", "input", "eval", "save", "action")
_BLIND_SECS = 5  # between two looks: this process has stood still, as all of the job may have (SIGSTOP, a paused VM)


def parse_limits(text: str) -> dict[str, float]:
    """Read `step:60,eval:600`. Raises UsageError."""
    limits = {}
    for part in filter(None, text.split(",")):
        phase, _, seconds = part.partition(":")
        try:
            limits[phase] = float(seconds)
        except ValueError:
            limits[phase] = 0.0
        if phase not in PHASES or not limits[phase] > 0:
            raise UsageError(
                f"hang_timeout has {part!r}; expected PHASE:SECONDS, such as step:60, with a phase out of "
                f"{', '.join(PHASES)}."
            )
    return limits


@final
class Watchdog:
    """Look at all workers of this place again and again. `given` are limits by phase that the person has set.

    Workers go in step, so they stand still together, and where one is allowed more time, the others wait for it: it is
    a hang when nobody moves and every worker is beyond its limit, but for those that wait for others themselves.
    Workers that no one here sees may be in any phase, which is what those here wait for.
    """

    def __init__(self, given: Mapping[str, float]) -> None:
        self._given = given
        self._longest: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def start(self, *, others_elsewhere: bool) -> None:
        """Begin an attempt; what was learned stays."""
        self._others_elsewhere = others_elsewhere
        self._before: dict[int, Sighting] = {}
        self._moved = 0.0  # when someone last did
        self._looked = 0.0

    def look(self, sightings: Mapping[int, Sighting], now: float) -> Sequence[int]:
        """Return the ranks that have hung, those furthest behind; none if the group is well."""
        if now - self._looked > _BLIND_SECS:
            self._moved = now
        self._looked = now
        for rank, seen in sightings.items():
            before = self._before.get(rank, seen)
            self._moved = max(self._moved, seen.changed)
            if seen != before:
                self._longest[before.phase] = max(self._longest[before.phase], seen.changed - before.changed)
        self._before = dict(sightings)
        busy = {rank: seen for rank, seen in sightings.items() if not seen.waits and seen.phase != "end"}
        awaited = busy or sightings
        if not awaited or not all(now - self._moved > self.limit(seen) for seen in awaited.values()):
            return ()
        behind = min(_position(seen) for seen in awaited.values())
        return [rank for rank, seen in awaited.items() if _position(seen) == behind]

    def limit(self, seen: Sighting) -> float:
        """Return after how many seconds without progress a worker is overdue."""
        phases = (seen.phase, *_OTHERS_WAIT_FOR) if seen.waits and self._others_elsewhere else (seen.phase,)
        return max(self._given.get(phase) or self._learned(phase) for phase in phases)

    def _learned(self, phase: str) -> float:
        first = _TIMES_COMPILE * self._longest["compile"] if phase in ("step", "eval") else 0
        return max(FLOORS[phase], _TIMES_LONGEST * self._longest[phase], first)


def _position(seen: Sighting) -> tuple[int, int, int, bool]:
    """Return what is lower for the one that others wait for: fewer steps, then the earlier part of a step."""
    order = {"import": 0, "setup": 1, "compile": 2, "input": 3, "step": 4}
    return seen.step, order.get(seen.phase, 5), seen.progress, seen.waits
