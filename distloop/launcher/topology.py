"""All workers of a run, and which of them this supervisor starts: pure functions of an environment and of flags."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Say where one supervisor runs: the host's name, and a port for each worker that it starts there."""

    host: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Hold the places of all supervisors in the order of their workers' ranks, and the index of this one.

    A host has one supervisor, but under Slurm with several tasks a node, where each task has its own.
    """

    places: tuple[Place, ...]
    index: int = 0

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
