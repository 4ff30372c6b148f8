"""From a topology to the exact commands of this host's workers. Pure: what runs and what --dry_run prints are one."""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distloop.cluster import Cluster, to_tf_config
from distloop.launcher.devices import own_share, share_out
from distloop.launcher.proxies import without_proxy
from distloop.launcher.topology import Topology

# For NumPy and other libraries, whose threads of several processes wait for each other in loops. Not
# TensorFlow's own TF_NUM_INTRAOP_THREADS and TF_NUM_INTEROP_THREADS: one thread for each of two workers was slower.
THREAD_SETTINGS = ("OMP_NUM_THREADS",)


class Worker(NamedTuple):
    """Say how one worker is started: `environment` is what differs from the supervisor's own, None what is unset."""

    rank: int
    command: tuple[str, ...]
    environment: Mapping[str, str | None]


def make_plan(
    topology: Topology, command: Sequence[str], environment: Mapping[str, str], *, gpus: Sequence[str], cores: int
) -> list[Worker]:
    """Return the workers of this place, in the order of their ranks.

    `gpus` and `cores` are what the supervisor, whose environment is given, may use; several workers on a host get
    disjoint GPUs, and equal shares of the cores as OMP_NUM_THREADS. Raises UsageError if the GPUs cannot be shared out
    equally.
    """
    hosts = [place.host for place in topology.places]
    direct = without_proxy(environment, hosts) if len(topology.addresses) > 1 else {}
    if topology.given is not None:
        return [Worker(topology.first_rank, tuple(command), direct)]
    supervisors, index = topology.neighbours
    own_gpus = own_share(gpus, environment, supervisors, index)
    workers = len(topology.here.ports)
    threads = _threads(environment, cores, workers, supervisors)
    plan = []
    for position, worker_gpus in enumerate(share_out(own_gpus, workers)):
        rank = topology.first_rank + position
        changes: dict[str, str | None] = {}
        if len(topology.addresses) > 1:
            changes["TF_CONFIG"] = to_tf_config(Cluster(topology.addresses, rank))
        elif "TF_CONFIG" in environment:
            changes["TF_CONFIG"] = None
        if worker_gpus != list(gpus):
            changes["CUDA_VISIBLE_DEVICES"] = ",".join(worker_gpus)
        plan.append(Worker(rank, tuple(command), {**changes, **threads, **direct}))
    return plan


def shell_line(worker: Worker) -> str:
    """Return the worker's command as a line for a POSIX shell."""
    unset = [word for name, value in worker.environment.items() if value is None for word in ("-u", name)]
    given = [f"{name}={value}" for name, value in worker.environment.items() if value is not None]
    return shlex.join([*(["env", *unset, *given] if worker.environment else []), *worker.command])


def _threads(environment: Mapping[str, str], cores: int, workers: int, supervisors: int) -> dict[str, str]:
    """Return the settings that keep several workers of a host to their share of its cores, where nobody has set them.

    Slurm may have bound each task to cores of its own: then there are less of them than the step has on this node.
    """
    is_bound = cores < int(environment.get("SLURM_CPUS_ON_NODE") or 0)
    sharing = workers if is_bound else workers * supervisors
    if sharing == 1:
        return {}
    share = str(max(1, cores // sharing))
    return {name: share for name in THREAD_SETTINGS if name not in environment}
