"""Who listens on a port of this machine, as far as /proc says."""

from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN in include/net/tcp_states.h


def holder(port: int) -> str | None:
    """Name the process that listens on `port`; None if there is none, or it is another user's or container's."""
    inodes = _inodes(port)
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if str(link.readlink()) in inodes:
                command = (link.parents[1] / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                return f"process {link.parts[2]} ({command.strip()[:80]})"
        except OSError:  # it has ended, or is another user's
            continue
    return None


def _inodes(port: int) -> set[str]:
    """Return what the sockets that listen on `port` are called in /proc/PID/fd."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in _table(name)]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port}


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []
