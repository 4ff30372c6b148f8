"""Of two supervised workers one goes wrong: the cause is told, all start again, and the result has the same bits."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests import faults, harness
from tests.faults import Run
from tests.harness import until
from tests.run_files import differences, saved_steps

# What is rehearsed, and what the report says of it: rank, exit code, and a part of what happened.
QUICK = {"1:20:kill": (1, 137, "was killed by SIGKILL")}
# Each comes in an attempt of its own, after a new checkpoint (these are six steps apart).
OTHERS = {
    "0:10:raise": (0, 1, "RuntimeError"),
    "1:18:exit0": (1, 1, "ended with exit code 0 before its work was done"),
    "1:26:stop": (1, 124, "it was stopped by a signal"),
    "0:34:hang": (0, 124, "hung: no progress for"),
    "0:42:torn_save": (0, 137, "was killed by SIGKILL"),
    "0:50:enospc": (0, 1, "No space left on device"),
}


def supervised(run, *flags):
    return harness.supervised(*run.command, workers=2, flags=[*flags, "--hang_timeout=step:4,input:4"])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    run, _ = faults.clean(tmp_path_factory.mktemp("clean") / "run", workers=2)
    return run.folder


def processes_of(run):
    """Return the processes whose command names the folder of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [path.parent.name] if str(run.folder) in path.read_text() else []
    return found


def reports(folder):
    paths = sorted(folder.glob("logs/rank_0/*.report.json"))
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("expected", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["kill", "others"])
def test_a_run_goes_on_after_each_fault_and_ends_with_the_same_bits(tmp_path, clean, expected):
    run = Run(tmp_path / "run", 2)
    code, out, err = harness.run(*supervised(run, f"--fault={','.join(expected)}"), fresh=True, limit_secs=500)
    assert code == 0, out + err
    for report, (fault, (rank, exit_code, what)) in zip(reports(run.folder), expected.items(), strict=True):
        assert (report["rank"], report["code"]) == (rank, exit_code), report
        assert what in report["what"]
        assert not report["collateral"]
        assert abs(report["step"] - int(fault.split(":")[1])) <= 6  # a save may be in the background
        assert f"distloop: rank {rank} on {os.uname().nodename} in " in err
    assert err.count("all workers start again in") == len(expected)
    assert not differences(run.folder, clean)
    assert len(list(run.folder.glob("logs/rank_*/attempt_*.log"))) == 2 * (len(expected) + 1)
    assert not processes_of(run)


@pytest.mark.slow
def test_a_nan_ends_the_run_for_good(tmp_path):
    run = Run(tmp_path / "run", 2, task="same_on_all")  # in float32: with a loss scale the step would be skipped
    code, _, err = harness.run(*supervised(run, "--fault=1:20:nan"), fresh=True)
    assert code == 65
    assert re.search(r"distloop: rank [01] on \S+ in \S+ after step \d+: the metric 'loss' stopped being finite", err)
    assert "It is not restarted: the same command would diverge again." in err


@pytest.mark.slow
def test_a_killed_supervisor_takes_its_workers_with_it_and_the_same_command_goes_on(tmp_path, clean):
    run = Run(tmp_path / "run", 2)
    process = harness.start(supervised(run), fresh=True)
    until(lambda: saved_steps(run.folder)[-1] >= 12, process, limit_secs=120)
    assert len(processes_of(run)) == 3
    os.kill(process.pid, signal.SIGKILL)
    harness.finish(process)
    until(lambda: not processes_of(run), limit_secs=5)
    code, out, err = harness.run(*supervised(run), fresh=True)
    assert (code, err) == (0, ""), out
    assert not differences(run.folder, clean)
