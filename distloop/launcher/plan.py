"""From a topology to the exact commands of this host's workers. Pure: what runs and what --dry_run prints are one."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distloop.cluster import Cluster, to_tf_config
from distloop.launcher.topology import Topology


@dataclass(frozen=True)
class Worker:
    """Say how one worker is started: `environment` is what differs from the supervisor's own, None what is unset."""

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str | None]


def make_plan(topology: Topology, command: Sequence[str]) -> list[Worker]:
    """Return the workers of this place, in the order of their ranks."""
    addresses = topology.addresses
    ranks = range(topology.first_rank, topology.first_rank + len(topology.here.ports))
    config = {rank: to_tf_config(Cluster(addresses, rank)) if len(addresses) > 1 else None for rank in ranks}
    return [Worker(rank, tuple(command), {"TF_CONFIG": config[rank]}) for rank in ranks]


def shell_line(worker: Worker) -> str:
    """Return the worker's command as a line for a POSIX shell."""
    unset = [word for name, value in worker.environment.items() if value is None for word in ("-u", name)]
    given = [f"{name}={value}" for name, value in worker.environment.items() if value is not None]
    return shlex.join(["env", *unset, *given, *worker.command])
