"""What this machine and this cluster environment look like to distloop, and what is wrong with them, with mends."""

import resource
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from distloop.errors import PortTakenError, PreflightError, UsageError
from distloop.launcher import agreement, checks, machine, readiness, wire
from distloop.launcher.checks import Line
from distloop.launcher.devices import local_gpus
from distloop.launcher.topology import Topology

_SMI_SECS, _TENSORFLOW_SECS = 30, 120  # a driver in trouble answers late or never
_REACH_SECS = 3
_NAME_WIDTH = 11


def run(resolve: Callable[[], Topology], environment: Mapping[str, str], *, workdir: str | None) -> int:
    """Print each line as soon as it is known; return 0, or 69 if something is wrong.

    `resolve` returns the topology, or raises UsageError, which is a line like all others.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(f"{socket.gethostname()}, as distloop sees it\n", flush=True)
    wrong = 0
    for line in _examine(resolve, environment, workdir):
        print(layout(line, width=width), flush=True)
        wrong += bool(line.mend)
    print(f"\n{wrong} to mend, marked !!" if wrong else "\nNothing is wrong.")
    return PreflightError.exit_code if wrong else 0


def layout(line: Line, *, width: int) -> str:
    """Return a line as text: a mark, its name, what was found, and the mend below."""
    first = f"{'!!' if line.mend else 'ok'}  {line.name:<{_NAME_WIDTH}} "
    margin = " " * len(first)
    parts = [(first, margin, line.value)] + [(f"{margin}-> ", f"{margin}   ", line.mend)] * bool(line.mend)
    return "\n".join(
        textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
        for start, indent, text in parts
    )


def _examine(resolve: Callable[[], Topology], environment: Mapping[str, str], workdir: str | None) -> Iterator[Line]:
    """Yield all lines, those that take time last."""
    yield checks.versions(agreement.versions())
    yield checks.cores(*machine.cores())
    yield checks.memory(*machine.memory())
    yield checks.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield checks.clock(time.strftime("%Y-%m-%d %H:%M:%S %Z"), kept=machine.clock_is_kept())
    if workdir is not None and "://" not in workdir:
        yield _disk(Path(workdir))
    yield checks.proxy(environment)
    try:
        topology = resolve()
    except UsageError as error:
        yield checks.of_error("cluster", error)
    else:
        yield from checks.cluster(topology)
        yield from _ports(topology)
        yield from _hosts(topology)
    try:
        usable = local_gpus(environment)
    except UsageError as error:
        yield checks.of_error("gpus", error)
    else:
        yield from _gpus(environment, usable)
        command = [sys.executable, "-c", checks.LIST_DEVICES]
        yield checks.tensorflow(*machine.ask(command, environment, limit_secs=_TENSORFLOW_SECS), usable)


def _disk(workdir: Path) -> Line:
    """Look at the folder of the run, or where it would be made."""
    nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        readiness.check_workdir(nearest)
    except PreflightError as error:
        return checks.of_error("workdir", error)
    return Line("workdir", f"{workdir}: {shutil.disk_usage(nearest).free / 2**30:.1f} GiB free")


def _gpus(environment: Mapping[str, str], usable: Sequence[str]) -> Iterator[Line]:
    try:
        readiness.check_gpus(usable)
        code, answer = machine.ask(machine.QUERY_GPUS, environment, limit_secs=_SMI_SECS)
    except PreflightError as error:
        yield checks.of_error("gpus", error)
        return
    except FileNotFoundError:
        yield Line("gpus", "none: there is no nvidia-smi")
        return
    yield from checks.gpus(code, answer, usable)
    if code == 0 and len(usable) > 1:
        _, answer = machine.ask(["nvidia-smi", "topo", "-m"], environment, limit_secs=_SMI_SECS)
        yield checks.links(machine.parse_links(answer))
        yield checks.shared_memory(shutil.disk_usage("/dev/shm").total, len(usable))


def _ports(topology: Topology) -> Iterator[Line]:
    for port in filter(None, topology.here.ports):
        try:
            wire.listen(port).close()
            yield Line("port", f"{port} is free")
        except PortTakenError as error:
            yield checks.of_error("port", error)


def _hosts(topology: Topology) -> Iterator[Line]:
    others = [place for index, place in enumerate(topology.places) if index != topology.index]
    addresses = [(place.host, place.ports[0]) for place in others]
    yield from checks.hosts(addresses, wire.reach(addresses, limit_secs=_REACH_SECS))
