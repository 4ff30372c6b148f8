"""What a host must have before its workers start; disks are real ones, small and read-only, in a mount namespace."""

import subprocess
import sys
from pathlib import Path

import pytest

from distloop.errors import PreflightError
from distloop.launcher.readiness import check_gpus, check_host, check_program, check_workdir
from tests.harness import ROOT


def test_a_host_that_has_everything_is_ready_and_nothing_is_left(tmp_path):
    check_host([sys.executable, "-m", "launch.train"], gpus=[], workdir=str(tmp_path / "runs" / "new"))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("runs"), Path("runs/new")]
    check_host(["sh"], gpus=[], workdir="gs://bucket/run")
    check_host(["sh"], gpus=[], workdir=None)


@pytest.mark.parametrize(("program", "where"), [("no-such-program", "on PATH"), ("./train.sh", f"in {Path.cwd()}")])
def test_a_program_that_is_not_there_is_told(program, where):
    with pytest.raises(PreflightError, match=rf"^host .+: there is no program {program} {where}; install it"):
        check_program(program)


@pytest.mark.parametrize(
    ("files", "gpus", "missing"),
    [
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], ["0", "1"], None),
        (["nvidia0", "nvidia1", "nvidiactl"], ["0", "2"], "GPU 2"),
        (["nvidia0"], ["GPU-4f0c"], None),
        (["nvidiactl"], ["GPU-4f0c"], "GPU GPU-4f0c"),
        ([], ["0"], "GPU 0"),
        ([], [], None),
        (["dxg"], ["0"], None),
    ],
)
def test_gpus_that_this_host_does_not_have_are_told(files, gpus, missing, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    if missing is None:
        check_gpus(gpus, devices=tmp_path)
        return
    count = sum(name[6:].isdecimal() for name in files)
    expected = rf"^host .+: {missing} is planned \(CUDA_VISIBLE_DEVICES\), but this host shows {count} GPU\(s\)"
    with pytest.raises(PreflightError, match=expected):
        check_gpus(gpus, devices=tmp_path)


@pytest.mark.parametrize(
    ("under", "why"), [("file", "Not a directory"), ("/proc/nowhere", "No such file or directory")]
)
def test_a_workdir_that_cannot_be_made_is_told(under, why, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match=rf"^host .+: workdir .+/run cannot be written to \({why}\); mount it"):
        check_workdir(tmp_path / under / "run")


ON_A_DISK = """
import subprocess, sys
from pathlib import Path
from distloop.errors import PreflightError
from distloop.launcher.readiness import check_workdir
folder, *options = sys.argv[1:]
for option in options:
    if option == "fill":
        subprocess.run(["head", "-c", "2M", "/dev/zero"], stdout=(Path(folder) / "rest").open("wb"), stderr=-3)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder, "-o", option], check=True)
try:
    check_workdir(Path(folder) / "run")
except PreflightError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["size=200M"], ""),
        (["size=48M"], "run has 50 MB left, less than 100 MB; free some space, or give another."),
        (
            ["size=1M", "fill"],
            "run cannot be written to (No space left on device); mount it here for writing, free some",
        ),
        (["size=200M", "remount,ro"], "run cannot be written to (Read-only file system); mount it here for writing"),
    ],
)
def test_a_disk_that_is_full_or_read_only_is_told(options, expected, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for mounts here")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", ON_A_DISK, str(tmp_path), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout
    assert bool(done.stdout) == bool(expected)
