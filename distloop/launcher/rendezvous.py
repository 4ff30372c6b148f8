"""Before each attempt the supervisors of all hosts meet; one whose run is over says so there."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from distloop.errors import PortTakenError, PreflightError, Stopped
from distloop.launcher.meeting import Ended, Meeting
from distloop.launcher.topology import Topology

TELL_SECS = 2  # for the others to hear why this host does not start


def meet(
    topology: Topology, job: str, facts: Mapping[str, Any], *, limit_secs: float, stop: Callable[[], bool]
) -> Ended | None:
    """Return None once the supervisors of all places are here, or what one says whose run has ended.

    `facts` are values of JSON that must be equal; `stop` is asked ten times a second. Raises PreflightError that names
    who is missing after `limit_secs`, or at once (on all hosts) who differs; PortTakenError; Stopped.
    """
    with Meeting(topology, job, facts) as meeting:
        try:
            meeting.listen()
            meeting.run(meeting.is_decided, limit_secs=limit_secs, stop=stop)
            if not meeting.problem and (meeting.heard or not meeting.missing()):
                return meeting.heard
            raise PreflightError(
                meeting.problem
                or f"waited {limit_secs:.0f} s for {meeting.missing()}. Start the same command on every host, or give "
                "more time with --start_timeout."
            )
        except PreflightError as error:
            ended = Ended(topology.here.host, error.exit_code, str(error))
            meeting.tell(ended, limit_secs=TELL_SECS, stop=stop)
            raise


def tell_the_end(topology: Topology, job: str, ended: Ended, *, limit_secs: float, stop: Callable[[], bool]) -> None:
    """Say to the supervisors of all other places that the run is over, once they meet again.

    Return when all have heard it or have ended too, after `limit_secs`, or when asked to stop.
    """
    with Meeting(topology, job, {}) as meeting, contextlib.suppress(Stopped):
        with contextlib.suppress(PortTakenError):  # it can still dial
            meeting.listen()
        meeting.tell(ended, limit_secs=limit_secs, stop=stop)
