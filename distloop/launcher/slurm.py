"""Who the tasks of a Slurm step are, read from the variables that srun sets. Pure functions of an environment.

The variables are described in srun(1). Slurm's own list of a step's hosts is in the order of its node table, and so are
the tasks of each; ranks go by the distribution. TensorFlow's `SlurmClusterResolver` sorts hosts as text, and is wrong.
"""

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from distloop.errors import UsageError

_MAX_HOSTS = 65536  # of one range, as for Slurm


class Step(NamedTuple):
    """Hold the host of every task in the order of their ranks, the rank of this one, and a name of the step."""

    hosts: tuple[str, ...]
    rank: int
    name: str


def in_step(environment: Mapping[str, str]) -> bool:
    """Tell whether this process is one of several that srun has started. A batch script is not: it calls srun."""
    return environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def read_step(environment: Mapping[str, str]) -> Step:
    """Return the step that this process is a task of. Raises UsageError if it is none, or the variables contradict."""
    nodes = expand(_text(environment, "SLURM_STEP_NODELIST"))
    counts = _task_counts(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if len(counts) != len(nodes):
        raise UsageError(
            f"SLURM_STEP_NODELIST has {len(nodes)} nodes ({', '.join(nodes)}), but SLURM_STEP_TASKS_PER_NODE counts "
            f"tasks of {len(counts)}; start the step again with srun, and set neither by hand."
        )
    tasks_of = dict(zip(nodes, counts, strict=True))
    ordered = _component_order(environment, nodes) if "SLURM_HET_SIZE" in environment else nodes
    hosts = _distribute(ordered, tasks_of, chunk=_chunk(environment))
    rank = _number(environment, "SLURM_PROCID")
    _check_place(environment, ordered, hosts, rank)
    step = f"{_text(environment, 'SLURM_JOB_ID')}.{_text(environment, 'SLURM_STEP_ID')}"
    return Step(tuple(hosts), rank, step)


def expand(text: str) -> list[str]:
    """Return the hosts of a node list such as `n[01-03,7],login`, in its order, as `scontrol show hostnames` does.

    What follows a bracket, as in `n[1-2]-ib`, is taken too, though Slurm does not. Raises UsageError.
    """
    # Commas within brackets part numbers, others part names.
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(items) != text or not items:
        raise UsageError(f"the node list {text!r} cannot be read; expected one such as n[01-03,7],login.")
    return [name for item in items for name in _expand_item(item, text)]


def _expand_item(item: str, text: str) -> list[str]:
    *pairs, end = re.split(r"\[([^\]]*)\]", item)
    literals, groups = pairs[::2], [_numbers(group, text) for group in pairs[1::2]]
    # Slurm counts the last group fastest, then the first.
    order = [*reversed(range(len(groups) - 1)), len(groups) - 1] if groups else []
    names = []
    for picked in itertools.product(*(groups[position] for position in order)):
        number = dict(zip(order, picked, strict=True))
        names.append("".join(literal + number[position] for position, literal in enumerate(literals)) + end)
    return names


def _numbers(group: str, text: str) -> list[str]:
    numbers = []
    for part in group.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not 0 <= int(high) - int(low) < _MAX_HOSTS:
            raise UsageError(
                f"the node list {text!r} has [{part}]; expected a number or a range from low to high of at most "
                f"{_MAX_HOSTS}, such as n[01-03,7]."
            )
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return numbers


def _task_counts(text: str) -> list[int]:
    """Read `2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if not match:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected counts of tasks such as 2(x3),1.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _component_order(environment: Mapping[str, str], nodes: list[str]) -> list[str]:
    """Return the nodes of a heterogeneous step in the order of its components: ranks go by it, the node list does not.

    A component's nodes are in SLURM_JOB_NODELIST_HET_GROUP_n, or ..._PACK_GROUP_n where srun has made the allocation.
    """
    found = []
    for component in range(_number(environment, "SLURM_HET_SIZE")):
        for kind in ("HET", "PACK"):
            text = environment.get(f"SLURM_JOB_NODELIST_{kind}_GROUP_{component}")
            if text:
                found += [node for node in expand(text) if node in nodes and node not in found]
    if len(found) != len(nodes):
        raise UsageError(
            f"this is a heterogeneous step on {', '.join(nodes)}, but the components named in "
            f"SLURM_JOB_NODELIST_HET_GROUP_* have {', '.join(found) or 'none'} of them; give each component its nodes, "
            "as sbatch and salloc do, or start one step for all."
        )
    return found


def _chunk(environment: Mapping[str, str]) -> int | None:
    """Return how many tasks in a row go to one node before the next one gets some; None fills each node."""
    text = environment.get("SLURM_DISTRIBUTION", "block")
    kind = re.split("[:,]", text)[0]  # what follows is about sockets, and about nodes that are not filled
    if kind not in ("block", "cyclic", "plane"):
        raise UsageError(
            f"SLURM_DISTRIBUTION is {text}, from which the place of other tasks cannot be known; start the step with "
            "srun --distribution=block (or cyclic)."
        )
    if kind == "plane":
        return _number(environment, "SLURM_DIST_PLANESIZE")
    return 1 if kind == "cyclic" else None


def _distribute(nodes: list[str], tasks_of: Mapping[str, int], *, chunk: int | None) -> list[str]:
    """Return the node of every task: in rounds, up to `chunk` for each node that still has room."""
    left = dict(tasks_of)
    hosts: list[str] = []
    while any(left.values()):
        for node in nodes:
            here = min(left[node], chunk or left[node])
            left[node] -= here
            hosts += [node] * here
    return hosts


def _check_place(environment: Mapping[str, str], nodes: list[str], hosts: list[str], rank: int) -> None:
    """Raise UsageError unless what Slurm says of this task is what follows for its rank."""
    if not 0 <= rank < len(hosts):
        raise UsageError(f"SLURM_PROCID is {rank}, but the step has {len(hosts)} tasks; start it again with srun.")
    ranks_here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    place = {
        "SLURM_STEP_NUM_TASKS": len(hosts),
        "SLURM_NODEID": nodes.index(hosts[rank]),
        "SLURM_LOCALID": ranks_here.index(rank),
        "SLURM_GTIDS": ",".join(map(str, ranks_here)),
    }
    for name, expected in place.items():
        if environment.get(name, str(expected)) != str(expected):
            raise UsageError(
                f"{name} is {environment[name]}, but should be {expected} for task {rank}, on {hosts[rank]}, by "
                f"SLURM_STEP_NODELIST ({environment['SLURM_STEP_NODELIST']}) and SLURM_STEP_TASKS_PER_NODE "
                f"({environment['SLURM_STEP_TASKS_PER_NODE']}); start the step with srun --distribution=block, or name "
                "the hosts with --hosts."
            )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{name} is {text!r}; expected a whole number, as srun sets it.")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise UsageError(
            f"{name} is not set, so this is no task of a Slurm step; start it with srun, or use --cluster=local."
        )
    return environment[name]
