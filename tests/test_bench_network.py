"""The scaling model on real hosts: what it learns of two of them at one rate of the network, it tells of others."""

from dataclasses import replace

import pytest

from benchmarks import fitting, records
from benchmarks.points import of_records
from tests import namespaces
from tests.harness import finish

pytestmark = pytest.mark.slow
LIMIT_SECS = 600
GRADIENT_BYTES = 2_000_000
# Bytes a second: so few that a step is 1 s of sending, and what else this machine does beside is little of it.
RATE = 2.5e6


def measure(hosts, folder, mode, rate):
    """Return the points that the benchmark measures with a worker on each host, and their cables at this rate."""
    for host in hosts:
        host.limit(rate)
    flags = [
        *("-m", "benchmarks.run", f"--mode={mode}", "--workload=null", f"--task_args=gradient_bytes={GRADIENT_BYTES}"),
        *("--batch=8", f"--workers={len(hosts)}", f"--hosts={','.join(host.name for host in hosts)}", "--nosplit"),
        *(f"--output={folder}", "--launches=1", "--windows=7", "--window_secs=0.01", "--warmup_secs=3"),
        "--comm_bytes=1e6",
    ]
    started = [host.start(*flags, f"--host_index={k}") for k, host in enumerate(hosts)]
    for process in started:
        code, out, err = finish(process, limit_secs=LIMIT_SECS)
        assert code == 0, (out, err)
    return records.read([folder])


@pytest.fixture(scope="module")
def hosts():
    namespaces.skip_unless_possible()
    with namespaces.hosts(3) as found:
        yield found


@pytest.fixture(scope="module")
def calibrated(hosts, tmp_path_factory):
    """The model of two hosts: their steps, and sums of two sizes by themselves, which tell start-up from bandwidth."""
    folder = tmp_path_factory.mktemp("calibration")
    modes = [measure(hosts[:2], folder / mode, mode, RATE) for mode in ("step", "comm")]
    return fitting.fit(of_records([record for mode in modes for record in mode]))


@pytest.mark.parametrize(("count", "rate"), [(2, 2 * RATE), (3, RATE)], ids=["another rate", "three hosts"])
def test_the_model_of_two_hosts_tells_the_step_within_10_percent(count, rate, hosts, calibrated, tmp_path):
    assert {"across", "start"} <= set(calibrated.free)
    across = calibrated.terms["across"] * RATE / rate  # seconds a byte
    known = replace(calibrated, terms={**calibrated.terms, "across": across})
    (config,) = known.compute
    told = fitting.predict(known, config, count, count, 8, GRADIENT_BYTES)
    (found,) = of_records(measure(hosts[:count], tmp_path, "step", rate))
    assert (found.devices, found.hosts) == (count, count)
    assert told.seconds == pytest.approx(found.seconds, rel=0.1)
    print(f"{calibrated.terms}: told {told.seconds:.3f} s, measured {found.seconds:.3f} s")
