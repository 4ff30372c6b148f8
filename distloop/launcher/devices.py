"""What this host has for its workers, found without TensorFlow: GPUs, and how they are shared out."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from distloop.errors import UsageError


def local_gpus(environment: Mapping[str, str], *, devices: Path = Path("/dev")) -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES would list them.

    Names are numbers, or identifiers of GPUs (GPU-...) or of parts of them (MIG-...). Without the variable the files of
    NVIDIA's driver count: CUDA numbers from 0 those that it finds, whatever their own numbers.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    words = (word.strip() for word in visible.split(","))
    # CUDA ignores what follows a name that it does not know, such as -1, or the empty one.
    names = list(itertools.takewhile(lambda word: word.isdecimal() or word.startswith(("GPU-", "MIG-")), words))
    if len(set(names)) != len(names):
        raise UsageError(f"CUDA_VISIBLE_DEVICES is {visible}, which names a GPU twice; name each once.")
    return names


def share_out(gpus: Sequence[str], parts: int) -> list[list[str]]:
    """Return `parts` lists of as many GPUs each, disjoint and in order; empty ones if there is none."""
    each, rest = divmod(len(gpus), parts)
    if rest:
        raise UsageError(
            f"{len(gpus)} GPU(s) ({', '.join(gpus)}) cannot be shared out to {parts} processes on this host; start a "
            "number of workers that divides them, or choose GPUs with CUDA_VISIBLE_DEVICES (empty: train on the CPU)."
        )
    return [list(gpus[begin : begin + each]) for begin in range(0, parts * each, each)] if each else [[]] * parts


def own_share(gpus: Sequence[str], environment: Mapping[str, str], supervisors: int, index: int) -> Sequence[str]:
    """Return the GPUs of one of several supervisors on this host.

    Slurm may have given each task its own already: then it shows less of them than the step has on this node.
    """
    if len(gpus) < int(environment.get("SLURM_GPUS_ON_NODE") or 0):
        return gpus
    return share_out(gpus, supervisors)[index]


def count_workers(text: str, gpus: Sequence[str]) -> int:
    """Return what the flag --workers means on a host with these GPUs."""
    if text == "per_gpu":
        if not gpus:
            raise UsageError(
                "workers is per_gpu, but this host shows no GPU (CUDA_VISIBLE_DEVICES is empty, or there is no "
                "/dev/nvidia0); give a number, such as --workers=2."
            )
        return len(gpus)
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise UsageError(f"workers is {text!r}; expected a number of at least 1, or per_gpu.")
    return int(text)
