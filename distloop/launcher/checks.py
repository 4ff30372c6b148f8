"""From what was found on a machine to lines for a person: what there is, and what to do where that is wrong. Pure."""

import errno
import json
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from distloop.errors import PreflightError, UsageError
from distloop.launcher import proxies
from distloop.launcher.machine import parse_gpus
from distloop.launcher.topology import Topology
from distloop.launcher.wire import problem

MARK = "distloop: "  # before the JSON that `LIST_DEVICES` prints, among what TensorFlow does
LIST_DEVICES = f"""
import json, tensorflow as tf
kinds = [device.device_type for device in tf.config.list_physical_devices()]
print("\\n{MARK}" + json.dumps({{"kinds": kinds, "cuda": tf.sysconfig.get_build_info().get("cuda_version")}}))
"""
_GIB = 2**30
_LEAST_MEMORY = 2 * _GIB  # TensorFlow itself takes half of it
_LEAST_SHM = _GIB  # as NCCL's documentation recommends; Docker gives 64 MiB
_LEAST_FILES = 1024
_BUSY = 0.1  # of a GPU's memory; the driver itself and a desktop take less
_SHOWN = 8  # addresses in a line


class Line(NamedTuple):
    """Say one thing. If it is wrong, `mend` says what to do."""

    name: str
    value: str
    mend: str = ""


def of_error(name: str, error: UsageError | PreflightError) -> Line:
    """Return the line of an error, whose sentences have the mend behind a semicolon."""
    found, _, mend = str(error).removesuffix(".").rpartition("; ")
    return Line(name, found.removeprefix(f"host {socket.gethostname()}: "), mend)


def versions(found: Mapping[str, str]) -> Line:
    """Say which versions are installed."""
    missing = [name for name, version in found.items() if version == "none"]
    mend = f"{sys.executable} -m pip install {' '.join(missing)}" if missing else ""
    return Line("versions", ", ".join(f"{name} {version}" for name, version in found.items()), mend)


def cores(usable: int, limit: float | None) -> Line:
    """Say how many cores there are, and whether more threads would be started than can run."""
    if limit is None or limit >= usable:
        return Line("cores", str(usable))
    few = max(1, int(limit))
    return Line(
        "cores",
        f"{usable}, of which the cgroup gives the time of {limit:g}",
        f"ask for as many cores, or set OMP_NUM_THREADS={few}: threads would wait for each other",
    )


def memory(total: int, free: int, limit: int | None) -> Line:
    """Say how much memory there is, and whether a worker fits."""
    inside = f" (the cgroup's limit is {_gib(limit)})" if limit else ""
    mend = "end other programs, or ask for more: a worker takes 1 GiB, its model and its data"
    return Line("memory", f"{_gib(free)} free of {_gib(total)}{inside}", mend if free < _LEAST_MEMORY else "")


def shared_memory(size: int, gpus: int) -> Line:
    """Say how large /dev/shm is, through which GPUs of several processes speak."""
    mend = "give the container more: docker run --shm-size=1g, or an emptyDir of medium Memory in Kubernetes"
    return Line("/dev/shm", _gib(size), mend if size < _LEAST_SHM and gpus > 1 else "")


def open_files(soft: int, hard: int) -> Line:
    """Say how many files a process may have open."""
    return Line("open files", f"{soft} a process", f"ulimit -n {hard}" if soft < _LEAST_FILES else "")


def clock(now: str, *, kept: bool) -> Line:
    """Say what the time is here. That it is right cannot be seen from inside of most containers."""
    return Line("clock", f"{now}{'' if kept else ', not synchronised as far as the kernel knows'}")


def gpus(code: int | None, answer: str, usable: Sequence[str]) -> Iterator[Line]:
    """Say which GPUs nvidia-smi shows; `code` is its exit code, None if it did not answer."""
    if code != 0:
        said = "nvidia-smi does not answer" if code is None else f"nvidia-smi says: {' '.join(answer.split())}"
        yield Line("gpus", said, "the driver is in trouble: load it again, or start this machine again")
        return
    found = parse_gpus(answer)
    models = Counter(gpu.name + (f" ({gpu.memory / 1024:.0f} GiB)" if gpu.memory else "") for gpu in found)
    names = ", ".join(f"{count} x {model}" for model, count in models.items())
    drivers = " and ".join(sorted({gpu.driver for gpu in found}))
    some = "" if len(usable) == len(found) else f"; {len(usable)} may be used here: {', '.join(usable) or 'none'}"
    yield Line("gpus", f"{names or 'none'}{f', driver {drivers}' if drivers else ''}{some}")
    for gpu in [gpu for gpu in found if {gpu.number, gpu.uuid} & set(usable)]:
        if gpu.used > _BUSY * gpu.memory:
            yield Line(
                f"gpu {gpu.number}",
                f"{gpu.used / 1024:.1f} of {gpu.memory / 1024:.0f} GiB are in use",
                "nvidia-smi shows by whom: end it, or leave this GPU out with CUDA_VISIBLE_DEVICES",
            )
        if gpu.mode == "Prohibited":
            mend = f"as root: nvidia-smi -i {gpu.number} -c DEFAULT"
            yield Line(f"gpu {gpu.number}", "is in compute mode Prohibited", mend)


def links(pairs: Mapping[str, int]) -> Line:
    """Say how GPUs are connected: by NVLink (NV12), one PCIe bridge (PIX), several (PXB), the CPU (PHB, NODE, SYS)."""
    return Line("links", ", ".join(f"{kind} between {count} pair(s)" for kind, count in pairs.items()) or "unknown")


def tensorflow(code: int | None, output: str, usable: Sequence[str]) -> Line:
    """Say what TensorFlow itself sees, from the output of `LIST_DEVICES`."""
    if code is None:
        return Line("tensorflow", "did not start in time", "look for a driver or a file system that does not answer")
    answers = [line for line in output.splitlines() if line.startswith(MARK)]
    if code != 0 or not answers:
        last = (output.strip().splitlines() or ["it says nothing"])[-1]
        return Line("tensorflow", f"does not start: {last}", f"{sys.executable} -c 'import tensorflow' shows all of it")
    answer = json.loads(answers[-1].removeprefix(MARK))
    count = Counter(answer["kinds"])
    cuda = f"built for CUDA {answer['cuda']}" if answer["cuda"] else "built without CUDA"
    text = f"sees {', '.join(f'{number} {kind}' for kind, number in sorted(count.items()))}; {cuda}"
    install = (
        f"{sys.executable} -m pip install 'tensorflow[and-cuda]', and look at what TensorFlow prints when it starts"
    )
    return Line("tensorflow", text, install if count["GPU"] < len(usable) else "")


def cluster(topology: Topology) -> Iterator[Line]:
    """Say who the workers are, and which of them are here."""
    workers, places = len(topology.addresses), len(topology.places)
    if workers == 1:
        yield Line("cluster", "none: one process")
        return
    known = all(all(place.ports) for place in topology.places)
    shown = topology.addresses[:_SHOWN] + (("...",) if workers > _SHOWN else ())
    where = f": {', '.join(shown)}" if known else ", on ports that are picked at the start"
    yield Line("cluster", f"{workers} workers, {places} supervisor(s){where}")
    first, count = topology.first_rank, len(topology.here.ports)
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    yield Line("here", f"number {topology.index}, {topology.here.host}: {ranks}{', the chief' if first == 0 else ''}")


def hosts(addresses: Sequence[tuple[str, int]], found: Sequence[Exception | None]) -> Iterator[Line]:
    """Say which other hosts can be reached, from the outcome of a connection to each."""
    there = [host for (host, _), error in zip(addresses, found, strict=True) if _answers(error)]
    if there:
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        yield Line("reachable", f"{', '.join(there[:_SHOWN])}{more}")
    for (host, port), error in zip(addresses, found, strict=True):
        if not _answers(error):
            assert error is not None
            resolves = not isinstance(error, socket.gaierror)
            mend = (
                "is it up, and does its firewall let this port through?" if resolves else "correct the name or the DNS"
            )
            yield Line("unreachable", f"{host} (port {port}) {problem(error)}", mend)


def _answers(error: Exception | None) -> bool:
    # Before a run nothing listens, but a host that says so is there.
    return error is None or (isinstance(error, OSError) and error.errno == errno.ECONNREFUSED)


def proxy(environment: Mapping[str, str]) -> Line:
    """Say whether gRPC would take a proxy."""
    name = proxies.grpc_proxy(environment)
    if name is None:
        return Line("proxy", "none")
    return Line("proxy", f"{name} is set; launch.run keeps what workers say to each other out of it")


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
