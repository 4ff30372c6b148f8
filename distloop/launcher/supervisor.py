"""Attempt after attempt, until the run has ended or there is no point in another one."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distloop.errors import PreflightError, Stopped
from distloop.launcher import member, policy, processes, report
from distloop.launcher.fault import VARIABLE as FAULT
from distloop.launcher.fault import Fault
from distloop.launcher.group import Group
from distloop.launcher.interrupts import Interrupts
from distloop.launcher.logs import Console, next_attempt
from distloop.launcher.plan import Worker
from distloop.launcher.policy import Ending, Restart
from distloop.launcher.report import Failure
from distloop.launcher.topology import Topology
from distloop.launcher.watchdog import Watchdog
from distloop.say import say, show

JOB = "distloop"  # what supervisors call themselves; of which run they are, their facts say
_TELL_SECS = 30  # for the other hosts to notice that workers are gone, and to hear why
CONSOLES = ("chief", "all", "errors")


class Settings(NamedTuple):
    """Hold what a person can choose about supervision; the flags of `launch.run` explain each."""

    log_dir: Path
    console: str
    max_restarts: int
    grace_secs: float
    hang_limits: dict[str, float]
    faults: Sequence[Fault]
    report: Path | None
    start_timeout_secs: float


def supervise(
    make_plan: Callable[[], tuple[Topology, list[Worker]]],
    settings: Settings,
    *,
    facts: Callable[[Topology], Mapping[str, Any]],
    check_host: Callable[[], None],
) -> int:
    """Run the workers of this place until they have ended well or for good; return the exit code.

    `make_plan` is asked anew for each attempt, since ports can be taken meanwhile. `check_host` raises PreflightError
    if this host cannot take part. Where there are other places, their supervisors meet before each attempt, must agree
    on the `facts`, and hear when it is over for one of them. Prints the cause of a failure last.
    """
    processes.adopt_orphans()
    history: list[Ending] = []
    watchdog = Watchdog(settings.hang_limits)
    with Interrupts() as interrupts:
        topology, plan = make_plan()
        if topology.is_evaluator:  # its rank is that of the chief, whose folder this may be
            settings = settings._replace(log_dir=settings.log_dir / "evaluator")
        with _telling_others(topology, interrupts):
            check_host()
        while True:
            try:
                code = _meet_others(topology, settings, facts, interrupts)
            except Stopped:
                return 128 + (interrupts.first or 0)
            if code is not None:
                return code
            if not history and topology.first_rank > 0 and settings.console == "chief":
                where = f"host {topology.places[0].host} shows the progress, the logs of this one are in"
                say(f"the workers start; {where} {settings.log_dir}.")
            watchdog.start(others_elsewhere=len(topology.places) > 1)
            number = max(next_attempt(_log_path(settings, worker, 0).parent) for worker in plan)
            with _telling_others(topology, interrupts):
                ending, failure = _attempt(plan, number, len(history), settings, watchdog, interrupts)
            history.append(ending)
            decision = policy.decide(history, max_restarts=settings.max_restarts)
            why = "" if isinstance(decision, Restart) else decision.why
            if failure is not None:
                _write_report(settings, plan[0], number, failure, why)
                if not isinstance(decision, Restart):
                    what = f"rank {failure.rank}: {failure.what}"
                    _tell_others(topology, failure.host, ending.code, what, interrupts)
                show(report.text(failure, why_no_restart=why))
            if not isinstance(decision, Restart):
                return ending.code
            say(f"all workers start again in {decision.delay:.1f} s.")
            if not _pause(decision.delay, interrupts):
                return 128 + (interrupts.first or 0)
            topology, plan = make_plan()


def _meet_others(
    topology: Topology, settings: Settings, facts: Callable[[Topology], Mapping[str, Any]], interrupts: Interrupts
) -> int | None:
    """Wait for the supervisors of the other places; return an exit code if the run is over for one of them."""
    if len(topology.places) == 1:
        return None
    from distloop.launcher import rendezvous  # which a run on one host need not load

    limit = settings.start_timeout_secs
    ended = rendezvous.meet(topology, JOB, facts(topology), limit_secs=limit, stop=lambda: interrupts.first is not None)
    if ended is None:
        return None
    say(f"the run is over on host {ended.host}: {ended.reason}")
    return ended.code


def _tell_others(topology: Topology, host: str, code: int, reason: str, interrupts: Interrupts) -> None:
    if len(topology.places) > 1:
        from distloop.launcher import rendezvous

        ended = rendezvous.Ended(host, code, reason)
        rendezvous.tell_the_end(topology, JOB, ended, limit_secs=_TELL_SECS, stop=lambda: interrupts.first is not None)


@contextlib.contextmanager
def _telling_others(topology: Topology, interrupts: Interrupts) -> Iterator[None]:
    """Let the other places know why nothing can be started here."""
    try:
        yield
    except PreflightError as error:
        _tell_others(topology, topology.here.host, error.exit_code, str(error), interrupts)
        raise


def _attempt(
    plan: Sequence[Worker],
    number: int,
    index: int,
    settings: Settings,
    watchdog: Watchdog,
    interrupts: Interrupts,
) -> tuple[Ending, Failure | None]:
    """Run attempt `index` of this supervisor, whose logs have the number `number`."""
    console = Console(os.environ)
    fault = settings.faults[index] if index < len(settings.faults) else None

    def start(position: int) -> member.Member:
        worker = plan[position]
        alone = settings.console == "chief" and worker.rank == 0
        added = {FAULT: f"{fault.step}:{fault.kind}"} if fault and fault.rank == worker.rank else {}
        path = _log_path(settings, worker, number)
        return member.start(
            worker,
            added,
            path,
            console if alone or settings.console == "all" else None,
            prefixed=len(plan) > 1,
            terminal=alone and sys.stdout.isatty(),
        )

    with Group(start, len(plan), watchdog=watchdog, interrupts=interrupts, grace_secs=settings.grace_secs) as group:
        return group.run()


def _log_path(settings: Settings, worker: Worker, attempt: int) -> Path:
    # By rank first: hosts that share the folder number their attempts each for itself.
    return settings.log_dir / f"rank_{worker.rank}" / f"attempt_{attempt}.log"


def _write_report(settings: Settings, worker: Worker, number: int, failure: Failure, why: str) -> None:
    path = _log_path(settings, worker, number).with_suffix(".report.json")
    texts = {path: report.as_json(failure, attempt=number, why_no_restart=why)}
    if settings.report is not None:
        texts[settings.report] = report.text(failure, why_no_restart=why)[-4096:] + "\n"  # Kubernetes shows as much
    for path, text in texts.items():
        try:
            path.write_text(text, errors="replace")
        except OSError as error:  # a full disk, perhaps, which may be the failure itself
            say(f"the report {path} cannot be written ({error.strerror}).")


def _pause(seconds: float, interrupts: Interrupts) -> bool:
    """Wait; return False at once when a signal comes."""
    limit = time.monotonic() + seconds
    while interrupts.first is None and (left := limit - time.monotonic()) > 0:
        select.select([interrupts], [], [], left)
        interrupts.clear()
    return interrupts.first is None
