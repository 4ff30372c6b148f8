"""What is measured: a case, one configuration of one workload in one mode. Imports no TensorFlow."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# What one process launch can measure; `benchmarks.run` has modes made of several of these, too.
MODES = ("step", "h2d", "input", "comm", "nocomm", "noupdate", "e2e", "startup")
PEERS = ("distloop", "loop", "loop_in_graph", "fit", "fit_many", "orbit")


@dataclass(frozen=True)
class Case:
    """Say what to measure. Cases with equal `key` measure the same and may be compared."""

    workload: str  # name of a task, as for --task
    mode: str = "step"
    peer: str = "distloop"
    workers: int = 1  # processes
    replicas: int = 1  # in each worker
    per_replica_batch: int = 64  # examples a replica a step, all micro-batches together
    settings: Mapping[str, Any] = field(default_factory=dict)  # of RunConfig, where they are not its defaults

    @property
    def name(self) -> str:
        """Return a short name for people."""
        peer = "" if self.peer == "distloop" else f" by {self.peer}"
        settings = "".join(f" {name}={value}" for name, value in self.settings.items())
        size = f"{self.workers}x{self.replicas} replicas, batch {self.per_replica_batch}"
        return f"{self.workload} {self.mode}{peer}, {size}{settings}"

    @property
    def total_replicas(self) -> int:
        """Return the number of replicas over all workers."""
        return self.workers * self.replicas

    @property
    def global_batch(self) -> int:
        """Return the examples of a step over all replicas."""
        return self.total_replicas * self.per_replica_batch

    @property
    def key(self) -> str:
        """Return a hash of the whole configuration."""
        return _hash(self.to_dict())

    @property
    def scaling_key(self) -> str:
        """Return a hash of the configuration but for its size: the points of one scaling curve share it."""
        size = ("workers", "replicas", "per_replica_batch")
        return _hash({name: value for name, value in self.to_dict().items() if name not in size})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "settings": dict(sorted(self.settings.items()))}


def from_dict(fields: Mapping[str, Any]) -> Case:
    """Return the case that `to_dict` wrote."""
    return Case(**fields)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
