"""The doctor: what it reads of a machine, what it says of it, and that it always comes to an end.

There is no GPU here: the answers of nvidia-smi below have the form of recorded ones (drivers 470 to 570).
"""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from distloop.errors import PreflightError, UsageError
from distloop.launcher import checks, doctor, machine
from distloop.launcher.checks import Line
from distloop.launcher.processes import free_ports
from distloop.launcher.proxies import without_proxy
from distloop.launcher.topology import Place, Topology

TWO_GPUS = """\
0, GPU-749a4951-86af-0c5a-2a58-67aa5ebf9d4e, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 7, Default
1, GPU-b1ff00c5-3253-827e-131a-a988b71d5e7b, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 30720, Prohibited
"""
NO_DRIVER = """\
NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver \
is installed and running.
"""
# The header is underlined where the output is a terminal.
TWO_LINKED = (
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tPHB\t0-63\t0\t\tN/A\n"
    "GPU1\tPHB\t X \t0-63\t0\t\tN/A\n"
    "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
)
FOUR_LINKED = """\
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity
GPU0     X      NV12    SYS     SYS     PIX     SYS     0-47,96-143     0
GPU1    NV12     X      SYS     SYS     NODE    SYS     0-47,96-143     0
GPU2    SYS     SYS      X      NV12    SYS     PIX     48-95,144-191   1
GPU3    SYS     SYS     NV12     X      SYS     NODE    48-95,144-191   1
NIC0    PIX     NODE    SYS     SYS      X      SYS
NIC1    SYS     SYS     PIX     NODE    SYS      X

Legend:

  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.mark.parametrize(
    ("code", "answer", "usable", "expected"),
    [
        (0, TWO_GPUS.splitlines()[0], ["0"], [("1 x NVIDIA A100-SXM4-80GB (80 GiB), driver 535.104.05", "")]),
        (
            0,
            TWO_GPUS,
            ["GPU-749a4951-86af-0c5a-2a58-67aa5ebf9d4e"],
            [
                (
                    "2 x NVIDIA A100-SXM4-80GB (80 GiB), driver 535.104.05; 1 may be used here: "
                    "GPU-749a4951-86af-0c5a-2a58-67aa5ebf9d4e",
                    "",
                )
            ],
        ),
        (
            0,
            TWO_GPUS,
            ["0", "1"],
            [
                ("2 x NVIDIA A100-SXM4-80GB (80 GiB), driver 535.104.05", ""),
                ("30.0 of 80 GiB are in use", "nvidia-smi shows by whom"),
                ("is in compute mode Prohibited", "as root: nvidia-smi -i 1 -c DEFAULT"),
            ],
        ),
        (
            0,
            "0, GPU-1, NVIDIA GB10, 580.1, [N/A], [N/A], Default",
            ["0"],
            [("1 x NVIDIA GB10, driver 580.1", "")],
        ),
        (9, NO_DRIVER, ["0"], [("nvidia-smi says: NVIDIA-SMI has failed because", "the driver is in trouble")]),
        (None, "", ["0"], [("nvidia-smi does not answer", "the driver is in trouble")]),
        (6, "No devices were found\n", [], [("nvidia-smi says: No devices were found", "the driver")]),
    ],
)
def test_gpus_are_as_nvidia_smi_shows_them(code, answer, usable, expected):
    lines = list(checks.gpus(code, answer, usable))
    assert len(lines) == len(expected)
    for line, (value, mend) in zip(lines, expected, strict=True):
        assert line.value.startswith(value)
        assert line.mend.startswith(mend)
        assert bool(line.mend) == bool(mend)


@pytest.mark.parametrize(
    ("answer", "pairs"),
    [(TWO_LINKED, {"PHB": 1}), (FOUR_LINKED, {"SYS": 4, "NV12": 2}), ("", {}), ("Failed to initialize NVML", {})],
)
def test_links_between_gpus_are_counted(answer, pairs):
    assert machine.parse_links(answer) == pairs
    assert checks.links(pairs).value == (
        ", ".join(f"{kind} between {count} pair(s)" for kind, count in pairs.items()) or "unknown"
    )


SEES_ONE = f'noise\n{checks.MARK}{{"kinds": ["CPU", "GPU"], "cuda": "12.5.1"}}\n'


@pytest.mark.parametrize(
    ("line", "value", "mend"),
    [
        (checks.versions({"distloop": "1", "keras": "3"}), "distloop 1, keras 3", ""),
        (checks.versions({"tensorflow": "none"}), "tensorflow none", f"{sys.executable} -m pip install tensorflow"),
        (checks.cores(8, None), "8", ""),
        (checks.cores(8, 8.0), "8", ""),
        (checks.cores(64, 7.5), "64, of which the cgroup gives the time of 7.5", "set OMP_NUM_THREADS=7"),
        (checks.memory(64 << 30, 32 << 30, None), "32.0 GiB free of 64.0 GiB", ""),
        (checks.memory(64 << 30, 1 << 30, 3 << 30), "(the cgroup's limit is 3.0 GiB)", "end other programs"),
        (checks.shared_memory(64 << 20, 1), "0.1 GiB", ""),
        (checks.shared_memory(64 << 20, 8), "0.1 GiB", "docker run --shm-size=1g"),
        (checks.open_files(20_000, 20_000), "20000 a process", ""),
        (checks.open_files(256, 4096), "256 a process", "ulimit -n 4096"),
        (checks.clock("now", kept=True), "now", ""),
        (checks.clock("now", kept=False), "now, not synchronised as far as the kernel knows", ""),
        (checks.proxy({"http_proxy": ""}), "none", ""),
        (checks.proxy({"http_proxy": "http://user:word@proxy"}), "http_proxy is set", ""),
        (checks.tensorflow(0, SEES_ONE, ["0"]), "sees 1 CPU, 1 GPU; built for CUDA 12.5.1", ""),
        (checks.tensorflow(0, SEES_ONE, ["0", "1"]), "sees 1 CPU, 1 GPU", "pip install 'tensorflow[and-cuda]'"),
        (checks.tensorflow(None, "", []), "did not start in time", "look for a driver or a file system"),
        (
            checks.tensorflow(1, "Trace\nImportError: libcudart\n", []),
            "does not start: ImportError: libcudart",
            "shows",
        ),
        (checks.tensorflow(-9, "", []), "does not start: it says nothing", "shows all of it"),
        (checks.of_error("cluster", UsageError("a is b; expected c.")), "a is b", "expected c"),
    ],
)
def test_what_is_wrong_has_a_mend_and_what_is_right_has_none(line, value, mend):
    assert value in line.value
    assert mend in line.mend
    assert bool(mend) == bool(line.mend)


def test_the_cluster_is_told_with_the_role_of_this_host():
    places = tuple(Place(f"n{k}", (20_000, 20_001)) for k in range(8))
    cluster, here = checks.cluster(Topology(places, 2))
    assert cluster.value.startswith("16 workers, 8 supervisor(s): n0:20000, n0:20001, n1:20000")
    assert cluster.value.endswith(", n3:20001, ...")
    assert here == Line("here", "number 2, n2: ranks 4 to 5")
    assert list(checks.cluster(Topology(places[:1], 0)))[1].value == "number 0, n0: ranks 0 to 1, the chief"
    assert list(checks.cluster(Topology((Place("127.0.0.1", (0,)),)))) == [Line("cluster", "none: one process")]


def test_hosts_that_cannot_be_reached_are_told():
    refused, late = ConnectionRefusedError(111, ""), TimeoutError(110, "")
    unknown = socket.gaierror(-2, "Name or service not known")
    addresses = [(name, 7) for name in ("a", "b", "c", "d")]
    assert list(checks.hosts(addresses, [None, refused, late, unknown])) == [
        Line("reachable", "a, b"),
        Line("unreachable", "c (port 7) does not answer", "is it up, and does its firewall let this port through?"),
        Line(
            "unreachable",
            "d (port 7) does not resolve to an address (Name or service not known)",
            "correct the name or the DNS",
        ),
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "250000 100000",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
            },
            1.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",  # a container sees its own as the root
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            1.5,
        ),
        ({"proc/self/cgroup": "1:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, None),
    ],
)
def test_the_limit_of_cores_is_that_of_the_cgroup(files, expected, tmp_path):
    write(tmp_path, files)
    assert machine.cores(tmp_path) == (len(os.sched_getaffinity(0)), expected)


V1 = "sys/fs/cgroup/memory"
MEMINFO = "MemTotal:       1000 kB\nMemFree:        1 kB\nMemAvailable:   600 kB"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1_024_000, 614_400, None)),
        ({"sys/fs/cgroup/a/memory.max": "max"}, (1_024_000, 614_400, None)),
        (
            {"sys/fs/cgroup/a/memory.max": "300000", "sys/fs/cgroup/a/memory.current": "1000"},
            (1_024_000, 299_000, 300_000),
        ),
        ({"sys/fs/cgroup/a/memory.max": "900000", "sys/fs/cgroup/memory.max": "800000"}, (1_024_000, 614_400, 800_000)),
        ({"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        (
            {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "500"},
            (1_024_000, 500, 500),
        ),
    ],
)
def test_the_limit_of_memory_is_that_of_the_cgroup(files, expected, tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a", **files})
    assert machine.memory(tmp_path) == (expected or (1_024_000, 614_400, None))


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"no_proxy": "a", "https_proxy": ""}, {}),
        ({"http_proxy": "p"}, {"no_grpc_proxy": "n1,::1"}),
        ({"https_proxy": "p", "no_proxy": "a,n1"}, {"no_grpc_proxy": "a,n1,::1"}),
        ({"grpc_proxy": "p", "no_proxy": "a", "no_grpc_proxy": "b"}, {"no_grpc_proxy": "b,n1,::1"}),
    ],
)
def test_workers_speak_to_each_other_without_a_proxy(environment, expected):
    assert without_proxy(environment, ["n1", "[::1]", "n1"]) == expected


ONE_PROCESS = Topology((Place("127.0.0.1", (0,)),))
ONE_CPU = checks.MARK + '{"kinds": ["CPU"], "cuda": null}'


@pytest.fixture
def examine(monkeypatch, capsys):
    """Run the doctor without the seconds that TensorFlow takes; return its exit code and what it prints."""
    monkeypatch.setattr(checks, "LIST_DEVICES", f"print({ONE_CPU!r})")

    def run(resolve=lambda: ONE_PROCESS, *, workdir=None, **environment):
        code = doctor.run(resolve, {"PATH": os.environ["PATH"], **environment}, workdir=workdir)
        return code, capsys.readouterr().out

    return run


def test_a_machine_in_order_gets_0(examine, tmp_path):
    code, out = examine(workdir=str(tmp_path / "new" / "run"))
    assert code == 0, out
    assert not list(tmp_path.iterdir())
    head, empty, *lines, space, end = out.splitlines()
    assert (head, empty, space, end) == (f"{socket.gethostname()}, as distloop sees it", "", "", "Nothing is wrong.")
    assert [line[:16].split() for line in lines if line[0] != " "] == [
        *(["ok", "versions"], ["ok", "cores"], ["ok", "memory"], ["ok", "open", "files"], ["ok", "clock"]),
        *(["ok", "workdir"], ["ok", "proxy"], ["ok", "cluster"], ["ok", "gpus"], ["ok", "tensorflow"]),
    ]


def test_each_thing_that_is_wrong_is_told_and_the_end_is_69(examine):
    ours, theirs = free_ports(2)
    places = (Place("127.0.0.1", (ours,)), Place("127.0.0.2", (theirs,)), Place("nosuch.invalid", (7,)))
    with socket.create_server(("", ours)):
        code, out = examine(
            lambda: Topology(places, 0), workdir="/proc/run", CUDA_VISIBLE_DEVICES="0,1", http_proxy="proxy:3128"
        )
    assert code == PreflightError.exit_code
    wrong = [line[4:15].strip() for line in out.splitlines() if line.startswith("!!")]
    assert wrong == ["workdir", "port", "unreachable", "gpus", "tensorflow"]
    assert f"port {ours} of this host is taken by process {os.getpid()}" in " ".join(out.split())
    assert "ok  reachable   127.0.0.2\n" in out
    assert out.count("-> ") == len(wrong)
    assert out.splitlines()[-1] == "5 to mend, marked !!"


def test_a_cluster_that_cannot_be_is_a_line_among_others(examine):
    def resolve():
        raise UsageError("workers is '0'; expected a number of at least 1, or per_gpu.")

    code, out = examine(resolve)
    assert code == PreflightError.exit_code
    assert "!!  cluster     workers is '0'\n                -> expected a number of at least 1, or per_gpu\n" in out


def test_programs_that_never_answer_are_left_behind_in_time(examine, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho begins\nexec sleep 600\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(checks, "LIST_DEVICES", "import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "_SMI_SECS", 0.3)
    monkeypatch.setattr(doctor, "_TENSORFLOW_SECS", 0.3)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    children = Path("/proc/self/task").joinpath(str(os.getpid()), "children")
    before = children.read_text().split()  # of other tests
    began = time.monotonic()
    code, out = examine()
    assert time.monotonic() - began < 5
    assert code == PreflightError.exit_code
    assert "!!  gpus        nvidia-smi does not answer\n" in out
    assert "!!  tensorflow  did not start in time\n" in out
    assert children.read_text().split() == before


def test_lines_fit_the_terminal():
    line = Line("cluster", "word " * 40, "mend " * 40)
    for width in (60, 100):
        text = doctor.layout(line, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert text.startswith("!!  cluster     word word")
        assert "\n                -> mend mend" in text


@pytest.mark.slow
def test_tensorflow_itself_is_asked():
    command = [sys.executable, "-c", checks.LIST_DEVICES]
    code, output = machine.ask(command, os.environ, limit_secs=120)
    assert checks.tensorflow(code, output, []).value.startswith("sees 1 CPU; built for CUDA 1"), output
