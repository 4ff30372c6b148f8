"""One attempt: all workers of this place, from their start to the end of the last or to the first failure."""

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from typing import final

from distloop.errors import NotFiniteError, Stopped
from distloop.launcher import member as members_lib
from distloop.launcher import processes, report
from distloop.launcher.interrupts import Interrupts
from distloop.launcher.logs import Log
from distloop.launcher.member import Member
from distloop.launcher.policy import Ending
from distloop.launcher.report import Failure
from distloop.launcher.watchdog import Watchdog
from distloop.say import say

HUNG_CODE = 124  # as timeout(1) says
_ALIKE = (Stopped.exit_code, NotFiniteError.exit_code)  # all workers end so, once each is done
_POLL_SECS = 0.1
_GATHER_SECS = 0.01  # many lines cost one round, not one each
_DUMP_SECS = 0.3  # for the workers' stacks to be written
_CAUSE_SECS = 0.6  # more for the true cause to show, when a worker has ended because of another one


@final
class Group:
    """Run one attempt. Enter it to start the workers; none of them, nor of their children, is there after it.

    `start` starts the worker at an index of the plan.
    """

    def __init__(
        self,
        start: Callable[[int], Member],
        size: int,
        *,
        watchdog: Watchdog,
        interrupts: Interrupts,
        grace_secs: float,
    ) -> None:
        self._start, self._size = start, size
        self._watchdog, self._interrupts, self._grace_secs = watchdog, interrupts, grace_secs
        self._members: list[Member] = []
        self._selector = selectors.DefaultSelector()
        self._deadline: float | None = None  # for the workers to end by themselves
        self._alike: int | None = None  # the code with which all end

    def __enter__(self) -> "Group":
        self._oom_kills = members_lib.oom_kills()
        self._selector.register(self._interrupts, selectors.EVENT_READ, self._interrupts.clear)
        try:
            for index in range(self._size):
                self._add(self._start(index))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pid in processes.kill_all([member.process for member in self._members]):
            say(f"process {pid} could not be killed: it may be in a driver or on a disk that does not answer.")
        for member in self._members:
            member.close()
        self._selector.close()

    def _add(self, member: Member) -> None:
        self._members.append(member)
        self._selector.register(member.descriptor, selectors.EVENT_READ, lambda: self._note_end(member))
        self._selector.register(member.log.descriptor, selectors.EVENT_READ, lambda: self._pump(member.log))

    def run(self) -> tuple[Ending, Failure | None]:
        """Wait for the end; return it, and the failure that was its cause."""
        while self._running():
            self._wait(_POLL_SECS)
            if self._must_kill():
                self._hide()
                code = 128 + (signal.SIGINT if self._interrupts.insists else signal.SIGKILL)
                return self._ended(code)
            if self._alike is None and any(self._has_failed(member) for member in self._members):
                return self._failed(self._find_cause())
            seen = {member.rank: member.beacon.read() for member in self._running()}
            if behind := self._watchdog.look(seen, time.monotonic()):
                return self._failed(self._find_hung(behind))
        return self._ended(self._alike or 0)

    def _running(self) -> list[Member]:
        return [member for member in self._members if member.ended is None]

    def _wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            key.data()
        time.sleep(_GATHER_SECS)
        if self._interrupts.first and self._deadline is None:
            self._ask_to_stop(self._interrupts.first)
        for member in self._members:
            seen = member.beacon.read()
            if member.begin is None and seen.phase not in ("import", "setup"):
                member.begin = seen.step

    def _pump(self, log: Log) -> None:
        if not log.pump():
            self._selector.unregister(log.descriptor)

    def _note_end(self, member: Member) -> None:
        self._selector.unregister(member.descriptor)
        member.process.wait()
        member.ended = time.time()
        code = member.process.returncode
        ended_by_signal = self._interrupts.first is not None and (
            code in (-signal.SIGTERM, -signal.SIGINT)
            or (code == -signal.SIGKILL and member.beacon.read().phase == "setup")
        )
        if self._alike is None and (code in _ALIKE or ended_by_signal):
            self._alike = Stopped.exit_code if ended_by_signal else code
            self._deadline = self._deadline or time.monotonic() + self._grace_secs

    def _has_failed(self, member: Member) -> bool:
        return member.ended is not None and (member.process.returncode != 0 or member.left_early)

    def _ask_to_stop(self, number: int) -> None:
        self._deadline = time.monotonic() + self._grace_secs
        say(f"{signal.Signals(number).name}: the workers are asked to stop, within {self._grace_secs:g} s (--grace).")
        for member in self._running():
            member.beacon.ask_to_stop()  # a signal could be kept from the worker by a wrapper around it
            phase = member.beacon.read().phase
            if phase == "import":
                member.process.terminate()
            elif phase == "setup":
                member.process.kill()  # TensorFlow's wait for its peers hears nothing, and there is nothing to save

    def _must_kill(self) -> bool:
        if self._deadline is None or not self._running():
            return False
        late = time.monotonic() > self._deadline
        if late:
            ranks = ", ".join(str(member.rank) for member in self._running())
            say(f"rank {ranks} did not stop within {self._grace_secs:g} s and is killed.")
        return late or self._interrupts.insists

    def _settle(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> None:
        limit = time.monotonic() + seconds
        while self._running() and time.monotonic() < limit and not until():
            self._wait(0.02)

    def _hide(self) -> None:
        for member in self._members:
            member.log.hide()

    def _dump_stacks(self) -> None:
        self._hide()
        for member in self._running():
            if member.attached:  # another program would be ended by the signal
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGUSR1)
        self._settle(_DUMP_SECS)

    def _failures(self) -> list[Failure]:
        oom_kills = members_lib.oom_kills() - self._oom_kills
        known = (members_lib.known_failure(member, oom_kills=oom_kills) for member in self._members)
        return [failure for failure in known if failure is not None]

    def _find_cause(self) -> Failure:
        """Return the first failure; if all that is known only follows from it, the others get a moment to tell."""
        self._dump_stacks()
        self._settle(_CAUSE_SECS, until=lambda: not report.first(self._failures()).collateral)
        cause = report.first(self._failures())
        if cause.collateral:
            for member in self._running():
                if processes.is_stopped(member.pid):
                    what = "was stopped by a signal, such as SIGSTOP, and did not go on"
                    return members_lib.failure(member, what, 128 + signal.SIGKILL)
        return cause

    def _find_hung(self, ranks: Sequence[int]) -> Failure:
        """Name the worker that hangs among `ranks`, which are at the same point, by what their stacks show."""
        now = time.monotonic()
        members = [member for member in self._members if member.rank in ranks]
        begins = [member.log.path.stat().st_size for member in members]
        self._dump_stacks()
        dumps = members_lib.stacks_of(members, begins)
        own = [
            index
            for index, (member, dump) in enumerate(zip(members, dumps, strict=True))
            if not (member.beacon.read().waits or report.waits_for_others(report.stacks(dump)))
        ]
        stopped = [index for index, member in enumerate(members) if processes.is_stopped(member.pid)]
        index = [*stopped, *own, 0][0]
        seen = members[index].beacon.read()
        what = f"hung: no progress for {now - seen.changed:.0f} s"
        if stopped:
            what += ", for it was stopped by a signal, such as SIGSTOP"
        elif not own:
            what += ", and so did all workers here: one waits for another, or for a host that does not answer"
        what += f" (--hang_timeout={seen.phase}:{self._watchdog.limit(seen):.0f})"
        return members_lib.failure(members[index], what, HUNG_CODE, details="\n".join(dumps[index]))

    def _ended(self, code: int) -> tuple[Ending, Failure | None]:
        if self._alike == NotFiniteError.exit_code:
            return self._failed(report.first(self._failures()))
        return self._ending(code), None

    def _failed(self, failure: Failure) -> tuple[Ending, Failure | None]:
        if failure.collateral and self._interrupts.first:  # other hosts, which were asked to stop too, were sooner
            return self._ending(Stopped.exit_code), None
        return self._ending(failure.code, failure), failure

    def _ending(self, code: int, failure: Failure | None = None) -> Ending:
        begun = [member for member in self._members if member.begin is not None]
        step = max((member.beacon.read().step for member in begun), default=None)
        if failure is not None and failure.error and begun:
            step = failure.step  # the beacon may be some tenths of a second late
        return Ending(
            code=code,
            error=failure.error if failure and not failure.collateral else None,
            begin=max((member.begin or 0 for member in begun), default=None),
            step=step,
            retry=failure is not None and (failure.error or "").startswith("PortTakenError"),
            asked=self._interrupts.first is not None,
        )
