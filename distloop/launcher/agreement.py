"""What must be the same on all hosts for them to train together, and in what two of them differ."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from distloop.launcher.topology import Topology

_CURES = {
    "workers": "give every host the same --hosts, --port and --workers",
    "gpus": "give every host as many GPUs",
    "command": "start the same command on every host",
}


def versions() -> dict[str, str]:
    """Return the versions that matter, "none" for what is not installed."""
    from importlib import metadata  # takes 25 ms, which a run on one host does not need

    import distloop

    found = {"distloop": distloop.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("tensorflow", "keras"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def facts(command: Sequence[str], topology: Topology, *, gpus: int) -> dict[str, Any]:
    """Return what must be the same on all hosts: versions, workers, the GPUs of a place, the command's arguments.

    The path of the program and --data_dir are each host's own matter.
    """
    own = ("--data_dir", "-data_dir")
    words = [word for before, word in pairwise(command) if word.partition("=")[0] not in own and before not in own]
    return {**versions(), "workers": list(topology.addresses), "gpus": gpus, "command": words}


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], expected: int | None) -> str | None:
    """Say in what another host differs so that nobody can start; None if in nothing."""
    here, there = ours["host"], theirs["host"]
    names = [name for name, value in ours["facts"].items() if theirs["facts"].get(name) != value]
    if names:
        pairs = [_apart(theirs["facts"].get(name), ours["facts"][name]) for name in names]
        said = ", ".join(f"{name} {pair[0]} (host {here}: {pair[1]})" for name, pair in zip(names, pairs, strict=True))
        return f"host {there} has {said}; {_CURES.get(names[0], 'install the same versions on all hosts')}."
    if theirs["place"] == ours["place"]:
        return (
            f"two hosts, {theirs['machine']} and {ours['machine']}, say that they are number {ours['place']} of "
            "--hosts; give each its own --host_index."
        )
    if expected not in (None, theirs["place"]):
        return (
            f"host {there} answers as number {theirs['place']} of --hosts where number {expected} was expected; give "
            "each host its own --host_index."
        )
    return None


def _apart(one: Any, other: Any) -> tuple[str, str]:
    """Return two values as text; of two lists what only one of them has."""
    if not (isinstance(one, list) and isinstance(other, list)):
        return str(one), str(other)
    if sorted(one) == sorted(other):  # in another order
        return " ".join(one), " ".join(other)
    only = [" ".join(entry for entry in a if entry not in b) or "nothing" for a, b in ((one, other), (other, one))]
    return only[0], only[1]
