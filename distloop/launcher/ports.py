"""Who listens on a port of this machine, as far as /proc says."""

import contextlib
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN in include/net/tcp_states.h


def holder(port: int) -> str | None:
    """Name the process that listens on `port`; None if there is none, or it is another user's or container's."""
    inodes = _inodes(port)
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(_target(link) in inodes for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                return f"process {process.name} ({command.strip()[:80]})"
    return None


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def _inodes(port: int) -> set[str]:
    """Return what the sockets that listen on `port` are called in /proc/PID/fd."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in _table(name)]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port}


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []
