"""Several hosts on one machine: network namespaces joined by a switch. Needs root and iproute2.

Processes share the cores and the files of this machine; only the network is apart, and the names of the hosts.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import harness


class Host(NamedTuple):
    """One host: its name for the others, and those of its namespace and of its port of the switch."""

    name: str
    namespace: str
    switch: str
    port: str

    def start(self, *arguments: str, **environment: str) -> harness.Process:
        """Start `python <arguments>` here, as `harness.start` does."""
        # `ip netns exec` becomes the command, and shows it the names in /etc/netns.
        become = "import os, sys; os.execvp('ip', ['ip', 'netns', 'exec', sys.argv[1], sys.executable, *sys.argv[2:]])"
        return harness.start(["-c", become, self.namespace, *arguments], fresh=True, **environment)

    def pids(self) -> list[int]:
        """Return the processes that run here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """End all that runs here at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self) -> None:
        """Take the cable out."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def heal(self) -> None:
        """Put the cable in."""
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def limit(self, bytes_per_second: float) -> None:
        """Limit the rate of the cable, each way. Needs tc of iproute2 and the kernel's token bucket."""
        # Nothing is lost, and little waits in the queue: what is lost is sent again only after 0.2 s, and what asks
        # for data waits behind data. BBR, the default of some kernels, now and then stops to measure.
        bucket = ("root", "tbf", "rate", f"{round(8 * bytes_per_second)}bit", "burst", "64kb", "limit", "64mb")
        for namespace, device in ((self.namespace, "eth0"), (self.switch, self.port)):
            _ip("netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, *bucket)
        for setting in ("tcp_wmem=4096 65536 65536", "tcp_congestion_control=reno"):
            _ip("netns", "exec", self.namespace, "sysctl", "-q", "-w", f"net.ipv4.{setting}")


@contextlib.contextmanager
def hosts(count: int, *, ipv6: bool = False) -> Iterator[list[Host]]:
    """Make hosts named a, b, c ... that reach each other by IPv4, or by IPv6 only. Nothing of them is left."""
    run = uuid.uuid4().hex[:8]
    switch = f"dl-{run}-switch"
    found = [Host(chr(ord("a") + k), f"dl-{run}-{k}", switch, f"p{k}") for k in range(count)]
    address = "fd77::{}" if ipv6 else "10.77.0.{}"
    names = "".join(f"{address.format(k + 1)} {host.name}\n" for k, host in enumerate(found))
    loopback = "::1 localhost\n" if ipv6 else "127.0.0.1 localhost\n"
    with contextlib.ExitStack() as stack:
        _add_namespace(switch, stack)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for k, host in enumerate(found):
            etc = Path("/etc/netns", host.namespace)
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            (etc / "hosts").write_text(loopback + names)
            _add_namespace(host.namespace, stack)
            stack.callback(host.kill)
            inside = ("-n", host.namespace)
            _ip(
                "link",
                "add",
                "eth0",
                "netns",
                host.namespace,
                "type",
                "veth",
                "peer",
                "name",
                host.port,
                "netns",
                switch,
            )
            nodad = ("nodad",) if ipv6 else ()  # an address that can be used at once
            _ip(*inside, "addr", "add", f"{address.format(k + 1)}/{64 if ipv6 else 24}", "dev", "eth0", *nodad)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", host.port, "master", "br0", "up")
        yield found
    assert run not in _ip("netns", "list")
    assert not list(Path("/etc/netns").glob(f"*{run}*"))


def skip_unless_possible() -> None:
    """Skip the test where no network namespace can be made."""
    name = f"dl-{uuid.uuid4().hex[:8]}-try"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here, which take root and iproute2: {error}")
    _ip("netns", "delete", name)


def _add_namespace(name: str, stack: contextlib.ExitStack) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "delete", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
