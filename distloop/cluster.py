"""Who the workers are, read from TF_CONFIG and checked. Imports no TensorFlow.

TF_CONFIG is TensorFlow's own format, JSON:

    {"cluster": {"worker": ["host0:port", "host1:port"]}, "task": {"type": "worker", "index": 0}}
"""

import json
from dataclasses import dataclass

from distloop.config import UsageError

_ADVICE = "unset it, or write it as python -m launch.run does"


@dataclass(frozen=True)
class Cluster:
    """Hold the workers' addresses (empty for a single process) and this process's place among them."""

    addresses: tuple[str, ...] = ()
    index: int = 0

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
    jobs = value.get("cluster") if isinstance(value, dict) else None
    if not isinstance(jobs, dict) or not all(isinstance(job, list) for job in jobs.values()):
        raise UsageError(f"TF_CONFIG has no 'cluster' of address lists; {_ADVICE}.")
    unknown = sorted(set(jobs) - {"chief", "worker"})
    if unknown:
        raise UsageError(
            f"TF_CONFIG names the job {unknown[0]!r} in 'cluster'; only 'chief' and 'worker' are supported "
            "(no parameter servers): list every process as a worker."
        )
    addresses = [*jobs.get("chief", []), *jobs.get("worker", [])]
    if len(set(addresses)) != len(addresses):
        raise UsageError(f"TF_CONFIG lists an address twice in {addresses}; give each worker its own host:port.")
    task = value.get("task")
    if not isinstance(task, dict) or task.get("type") not in jobs or not isinstance(task.get("index"), int):
        raise UsageError(f"TF_CONFIG has the task {task!r}; expected a 'type' out of {sorted(jobs)} and an 'index'.")
    if not 0 <= task["index"] < len(jobs[task["type"]]):
        raise UsageError(
            f"TF_CONFIG has task index {task['index']}, but 'cluster' lists {len(jobs[task['type']])} "
            f"{task['type']}(s); number them from 0."
        )
    offset = len(jobs.get("chief", [])) if task["type"] == "worker" else 0
    return Cluster(tuple(addresses), offset + task["index"])


def to_tf_config(cluster: Cluster) -> str:
    """Return the TF_CONFIG of one worker of `cluster`."""
    return json.dumps(
        {"cluster": {"worker": list(cluster.addresses)}, "task": {"type": "worker", "index": cluster.index}}
    )
