"""Who the workers are, read from TF_CONFIG and checked. Imports no TensorFlow.

TF_CONFIG is TensorFlow's own format, JSON; keys that are not named here are ignored:

    {"cluster": {"chief": ["host0:port"], "worker": ["host1:port", "host2:port"]},
     "task": {"type": "worker", "index": 0}}

An evaluator (task type `evaluator`, whether listed in `cluster` or not) is no part of the cluster that trains.
"""

import functools
import json
import socket
from dataclasses import dataclass
from typing import Any

from distloop.errors import UsageError, check_address
from distloop.launcher.wire import listen

_ADVICE = "unset it, and let python -m launch.run write it"


@dataclass(frozen=True)
class Cluster:
    """Hold the workers' addresses (empty for a single process) and this process's place among them."""

    addresses: tuple[str, ...] = ()
    index: int = 0
    is_evaluator: bool = False  # alone, beside the workers that train

    @property
    def num_workers(self) -> int:
        """Return the number of processes that train together."""
        return max(1, len(self.addresses))

    @property
    def is_chief(self) -> bool:
        """Tell whether this process writes files and talks to the person."""
        return self.index == 0


def from_tf_config(text: str | None) -> Cluster:
    """Read the value of TF_CONFIG; `None` or an empty value is one process. Raises UsageError naming the field."""
    if not text:
        return Cluster()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"TF_CONFIG is not JSON ({error}); {_ADVICE}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"TF_CONFIG is {text}; expected a JSON object with 'cluster' and 'task'; {_ADVICE}.")
    jobs = _jobs(value.get("cluster"))
    kind, index = _task(value.get("task"), jobs)
    if kind == "evaluator":
        return Cluster(is_evaluator=True)
    chief = jobs.get("chief", [])
    return Cluster((*chief, *jobs.get("worker", [])), index + (len(chief) if kind == "worker" else 0))


def to_tf_config(cluster: Cluster) -> str:
    """Return the TF_CONFIG of one worker of `cluster`."""
    return json.dumps(
        {"cluster": {"worker": list(cluster.addresses)}, "task": {"type": "worker", "index": cluster.index}}
    )


def _jobs(jobs: Any) -> dict[str, list[str]]:
    if not isinstance(jobs, dict) or not all(isinstance(job, list) for job in jobs.values()):
        raise UsageError(f"TF_CONFIG has no 'cluster' of address lists; {_ADVICE}.")
    unknown = sorted(set(jobs) - {"chief", "worker", "evaluator"})
    if unknown:
        raise UsageError(
            f"TF_CONFIG names the job {unknown[0]!r} in 'cluster'; there are 'chief', 'worker' and 'evaluator' (no "
            "parameter servers): list every process that trains as a worker."
        )
    if len(jobs.get("chief", [])) > 1:
        raise UsageError(f"TF_CONFIG lists {len(jobs['chief'])} chiefs; expected one, and the others as workers.")
    addresses = [address for job in jobs.values() for address in job]
    for address in addresses:
        check_address(str(address), "an address in TF_CONFIG")
    if len(set(addresses)) != len(addresses):
        raise UsageError(f"TF_CONFIG lists an address twice in {addresses}; give each process its own host:port.")
    return jobs


def _task(task: Any, jobs: dict[str, list[str]]) -> tuple[str, int]:
    kinds = sorted({*jobs, "evaluator"})
    if not isinstance(task, dict) or task.get("type") not in kinds or type(task.get("index")) is not int:
        raise UsageError(
            f"TF_CONFIG has the task {task!r}; expected a 'type' out of {kinds} and an 'index', a whole number."
        )
    kind, index = task["type"], task["index"]
    count = len(jobs[kind]) if kind in jobs else 1
    if not 0 <= index < count:
        raise UsageError(
            f"TF_CONFIG has task index {index}, but 'cluster' has {count} process(es) of type {kind!r}; "
            "number them from 0."
        )
    return kind, index


@functools.cache  # once a process: from then on TensorFlow has the port
def check_own_address(cluster: Cluster) -> None:
    """Raise UsageError if this worker's address is another machine's, PortTakenError if its port is taken.

    A name that cannot be resolved (yet) is not judged. One worker needs no address.
    """
    if cluster.num_workers == 1:
        return
    address = cluster.addresses[cluster.index]
    host, _, port = address.rpartition(":")
    if is_this_machine(host) is False:
        raise UsageError(
            f"TF_CONFIG gives this worker (number {cluster.index}) the address {address}, which this machine does not "
            "have; give every machine its own task index, and an address of its own network interfaces."
        )
    listen(int(port)).close()


def is_this_machine(host: str) -> bool | None:
    """Tell whether a name or an address (IPv6 ones in brackets or not) is this machine's; None if it is unknown."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError):
        return None
    return any(_can_bind(family, where) for family, _, _, _, where in found)


def _can_bind(family: int, where: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind(where)
    except OSError:
        return False
    return True
