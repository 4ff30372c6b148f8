"""What this machine has, read from the kernel and from nvidia-smi without TensorFlow; nothing here waits for ever."""

import contextlib
import csv
import ctypes
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distloop.launcher import processes

_QUERY = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used", "compute_mode")
# The command whose output `parse_gpus` understands.
QUERY_GPUS = ("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_UNLIMITED = 1 << 60  # cgroup v1 says a number near 2**63


class Gpu(NamedTuple):
    """Hold what nvidia-smi says of a GPU; memory in MiB."""

    number: str
    uuid: str
    name: str
    driver: str
    memory: int
    used: int
    mode: str


def ask(command: Sequence[str], environment: Mapping[str, str], *, limit_secs: float) -> tuple[int | None, str]:
    """Run a program; return its exit code and all it has printed. The code is None if it was killed at the limit.

    A process that a driver does not let go is left behind. Raises FileNotFoundError if there is no such program.
    """
    with tempfile.TemporaryFile() as output:
        process = processes.start(command, environment=environment, output=output.fileno())
        limit = time.monotonic() + limit_secs
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        code = process.poll()
        if code is None:
            process.kill()
            with contextlib.suppress(Exception):
                process.wait(timeout=2)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def parse_gpus(text: str) -> list[Gpu]:
    """Return the GPUs in the output of nvidia-smi. What a GPU does not tell, such as [N/A], counts as 0."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) == len(_QUERY)]
    return [
        Gpu(number, uuid, name, driver, _number(memory), _number(used), mode)
        for number, uuid, name, driver, memory, used, mode in rows
    ]


def parse_links(text: str) -> dict[str, int]:
    """Return how many pairs of GPUs `nvidia-smi topo -m` shows for each kind of link, such as NV12 or SYS."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the header is underlined
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    header = next((row for row in rows if len(row) > 1 and row[1].startswith("GPU")), [])
    size = sum(bool(re.fullmatch(r"GPU\d+", word)) for word in header)
    table = [row[1 : 1 + size] for row in rows if row is not header]
    return dict(Counter(table[a][b] for a in range(len(table)) for b in range(a + 1, size)).most_common())


def cores(root: Path = Path("/")) -> tuple[int, float | None]:
    """Return how many cores this process may use, and how much of them its cgroup gives it, if that is limited."""
    limits = []
    for folder in _cgroups(root, "cpu"):
        quota, period = (_read(folder / "cpu.max") or "").split() or ("max", "0")
        if quota == "max":
            quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "0"
        if int(quota) > 0:
            limits.append(int(quota) / int(period))
    return len(os.sched_getaffinity(0)), min(limits, default=None)


def memory(root: Path = Path("/")) -> tuple[int, int, int | None]:
    """Return the bytes of memory of this machine, those that are free, and the limit of this process's cgroup."""
    lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit: int | None = None
    for folder in _cgroups(root, "memory"):
        for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            text = _read(folder / most) or "max"
            if text != "max" and int(text) < min(total, _UNLIMITED):
                limit = min(int(text), limit or total)
                free = min(free, int(text) - int(_read(folder / now) or 0))
    return total, free, limit


def clock_is_kept() -> bool:
    """Tell whether the kernel was told that a time service keeps the clock right."""
    return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) != _UNSYNCHRONISED


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of those around it, version 1 or 2."""
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names in ("", controller) or controller in names.split(","):
            base = root / "sys/fs/cgroup" / (names if names else "")
            own = base / path.strip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return found


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
