"""The scaling model on real hosts: what it learns of two at one rate of the network, it tells of others."""

import pytest

from benchmarks import records
from benchmarks.points import of_records
from tests.harness import finish

pytestmark = pytest.mark.slow
LIMIT_SECS = 300
GRADIENT_BYTES = 8_000_000
RATE = 2.5e6  # bytes a second: so slow that sending takes seconds, and what else this machine does is little beside


def measure(hosts, folder, mode, rate):
    """Return the points of a step, or of one without communication, with a worker on each host."""
    for host in hosts:
        host.limit(rate)
    flags = [
        *("-m", "benchmarks.run", f"--mode={mode}", "--workload=null", f"--task_args=gradient_bytes={GRADIENT_BYTES}"),
        *("--batch=8", f"--workers={len(hosts)}", f"--hosts={','.join(host.name for host in hosts)}", "--nosplit"),
        *(f"--output={folder}", "--launches=1", "--windows=9", "--window_secs=0.01", "--warmup_secs=3"),
    ]
    started = [host.start(*flags, f"--host_index={k}") for k, host in enumerate(hosts)]
    for process in started:
        code, out, err = finish(process, limit_secs=LIMIT_SECS)
        assert code == 0, (out, err)
    return of_records(records.read([folder]))
