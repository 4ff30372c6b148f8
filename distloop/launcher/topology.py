"""All workers of a run, and which of them this supervisor starts: pure functions of an environment and of flags."""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distloop.cluster import Cluster, from_tf_config
from distloop.errors import UsageError, check_address
from distloop.launcher import slurm
from distloop.launcher.devices import count_workers, own_share

KINDS = ("auto", "local", "hosts", "slurm", "tf_config", "tpu")
_FIRST_PORT, _PORTS = 20_000, 10_000  # derived ports; the system's own, for clients, begin at 32768
_LOOPBACK = "127.0.0.1"


class Place(NamedTuple):
    """Say where one supervisor runs: the host's name, and a port for each worker that it starts there."""

    host: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Hold the places of all supervisors in the order of their workers' ranks, and the index of this one.

    A host has one supervisor, but for Slurm with several tasks a node, and for --hosts that differ in their ports only.
    """

    places: tuple[Place, ...]
    index: int = 0
    given: Cluster | None = None  # as TF_CONFIG says, which somebody else has set, and which stays as it is

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return host:port of every worker, in the order of ranks."""
        return tuple(f"{place.host}:{port}" for place in self.places for port in place.ports)

    @property
    def first_rank(self) -> int:
        """Return the rank of the first worker of this place."""
        return sum(len(place.ports) for place in self.places[: self.index])

    @property
    def here(self) -> Place:
        """Return the place of this supervisor."""
        return self.places[self.index]

    @property
    def is_evaluator(self) -> bool:
        """Tell whether the process of this place evaluates what others train."""
        return self.given is not None and self.given.is_evaluator

    @property
    def neighbours(self) -> tuple[int, int]:
        """Return how many supervisors this host has, and the index of this one among them."""
        here = [index for index, place in enumerate(self.places) if place.host == self.here.host]
        return len(here), here.index(self.index)

    @property
    def needs_ports(self) -> bool:
        """Tell whether ports are to be picked for each attempt: all workers are on this host."""
        return self.given is None and not all(self.here.ports)

    def with_ports(self, ports: Sequence[int]) -> "Topology":
        """Return this topology with these ports for the workers of its only place."""
        return replace(self, places=(Place(self.here.host, tuple(ports)),))


class Placement(NamedTuple):
    """Hold what the flags of `launch.run` say of where its workers are; `workdir` is that of the command, if known."""

    workers: str = "1"
    cluster: str = "auto"
    hosts: tuple[str, ...] = ()
    host_index: int | None = None
    port: int | None = None
    workdir: str = ""


def resolve(
    placement: Placement,
    environment: Mapping[str, str],
    *,
    gpus: Sequence[str],
    is_here: Callable[[str], bool | None],
) -> Topology:
    """Return the topology of a run. Raises UsageError for flags that contradict each other or the environment.

    `gpus` are this host's; `is_here` tells whether a name or an address is this machine's.
    """
    kind = _kind(placement, environment)
    _check_flags(placement, kind)
    if kind == "tf_config":
        return _given(placement, environment.get("TF_CONFIG"))
    if kind == "hosts":
        seats, index = _hosts(placement, environment, is_here)
    elif kind == "slurm":
        step = slurm.read_step(environment)
        port = placement.port or _derived_port("slurm", step.name)
        seats, index = [(host, port) for host in step.hosts], step.rank
    else:
        seats, index = [(_LOOPBACK, 0)], 0
    one_each = Topology(tuple(Place(host, (port,)) for host, port in seats), index)
    workers = count_workers(placement.workers, own_share(gpus, environment, *one_each.neighbours))
    if kind == "tpu" and workers != 1:
        raise UsageError(f"workers is {placement.workers}, but one process drives all TPU cores of a host; drop it.")
    return Topology(_places(seats, workers), index)


def _kind(placement: Placement, environment: Mapping[str, str]) -> str:
    """Return the kind of topology that is meant."""
    if placement.cluster not in KINDS:
        raise UsageError(f"cluster is {placement.cluster!r}; expected one of {', '.join(KINDS)}.")
    if placement.cluster != "auto":
        return placement.cluster
    if environment.get("TF_CONFIG"):
        return "tf_config"
    if placement.hosts:
        return "hosts"
    return "slurm" if slurm.in_step(environment) else "local"


def _check_flags(placement: Placement, kind: str) -> None:
    """Raise UsageError for flags that only another kind of topology takes."""
    why = {"tf_config": " (TF_CONFIG is set)", "slurm": " (srun started this)"}.get(kind, "")
    how = f"cluster is {kind}{why if placement.cluster == 'auto' else ''}"
    if placement.hosts and kind != "hosts":
        raise UsageError(f"hosts is given, but {how}; drop --hosts, or add --cluster=hosts.")
    if kind == "hosts" and not placement.hosts:
        raise UsageError("cluster is hosts, but none are given; add --hosts=a,b with the names of all hosts.")
    if placement.host_index is not None and kind != "hosts":
        raise UsageError(f"host_index is {placement.host_index}, but {how}; it goes with --hosts.")
    if placement.port is not None and kind not in ("hosts", "slurm"):
        raise UsageError(f"port is {placement.port}, but {how}, which needs none; drop it.")
    if placement.port is not None and not 0 < placement.port < 2**16:
        raise UsageError(f"port is {placement.port}; expected 1 to 65535, the first port of each host's workers.")


def _given(placement: Placement, tf_config: str | None) -> Topology:
    if not tf_config:
        raise UsageError("cluster is tf_config, but TF_CONFIG is not set; set it, or drop --cluster.")
    if placement.workers != "1":
        raise UsageError(
            f"workers is {placement.workers}, but TF_CONFIG is set, which is of one process; drop --workers, or unset "
            "TF_CONFIG."
        )
    given = from_tf_config(tf_config)
    addresses = given.addresses or (f"{_LOOPBACK}:0",)
    places = [Place(host, (int(port),)) for host, _, port in (address.rpartition(":") for address in addresses)]
    return Topology(tuple(places), given.index, given)


def _hosts(
    placement: Placement, environment: Mapping[str, str], is_here: Callable[[str], bool | None]
) -> tuple[list[tuple[str, int]], int]:
    """Return host and first port of each entry of --hosts, and the index of this one."""
    entries = [_split(text) for text in placement.hosts]
    names = ", ".join(placement.hosts)
    if len(set(entries)) != len(entries):
        raise UsageError(
            f"hosts ({names}) lists one twice; name each host once, and start several workers on it with --workers."
        )
    default = placement.port or _derived_port(*placement.hosts, placement.workdir)
    seats = [(host, port or default) for host, port in entries]
    index, source = placement.host_index, "host_index"
    if index is None and (text := environment.get("JOB_COMPLETION_INDEX")):
        if not (text.isascii() and text.isdecimal()):
            raise UsageError(f"JOB_COMPLETION_INDEX is {text!r}; expected the index of this pod's host among --hosts.")
        index, source = int(text), "JOB_COMPLETION_INDEX"
    if index is None:
        own = [position for position, (host, _) in enumerate(entries) if is_here(host)]
        if len(own) != 1:
            found = f"{len(own)} of them are" if own else "none of them is"
            raise UsageError(
                f"hosts are {names}, and {found} this machine; say which one this is with --host_index, counted from 0."
            )
        index = own[0]
    if not 0 <= index < len(seats):
        raise UsageError(f"{source} is {index}, but there are {len(seats)} hosts ({names}); count them from 0.")
    return seats, index


def _split(text: str) -> tuple[str, int | None]:
    """Return the host of one entry of --hosts, IPv6 addresses in brackets, and its port, if it has one."""
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    has_port = ":" in text and not text.endswith("]")
    address = text if has_port else f"{text}:1"
    try:
        check_address(address, "a host")
    except UsageError as error:
        raise UsageError(f"hosts has {text!r}; expected a name or an address, or one with a port: a:5000.") from error
    host, _, port = address.rpartition(":")
    return host, int(port) if has_port else None


def _places(seats: Sequence[tuple[str, int]], workers: int) -> tuple[Place, ...]:
    """Give each seat (host, first port) ports for its workers; seats that are alike get different ones."""
    taken = Counter[tuple[str, int]]()
    places = []
    for host, port in seats:
        begin = port + taken[host, port]
        taken[host, port] += workers
        places.append(Place(host, tuple(range(begin, begin + workers)) if port else (0,) * workers))
    if any(number >= 2**16 for place in places for number in place.ports):
        raise UsageError(f"port is {seats[0][1]}, too high for {workers} workers; give a lower --port.")
    addresses = Counter(Topology(tuple(places)).addresses)
    address, times = addresses.most_common(1)[0]
    if times > 1 and places[0].ports[0]:
        raise UsageError(
            f"hosts give {times} workers the address {address}; leave {workers} ports between those of one host."
        )
    return tuple(places)


def _derived_port(*words: str) -> int:
    """Return a first port that is the same on all hosts and, most likely, no other run's on them."""
    return _FIRST_PORT + zlib.crc32("\0".join(words).encode()) % _PORTS
