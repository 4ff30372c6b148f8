"""Emitted batch scripts under a real Slurm of two nodes on this machine, and what Slurm tells its tasks."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import final

import pytest

from distloop.launcher.emit import emit
from distloop.launcher.emit_settings import Settings
from tests import harness, real_slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(real_slurm.missing() is not None, reason=str(real_slurm.missing())),
]
LIMIT_SECS = 60


@final
class Slurm:
    """Two nodes whose names are addresses of this machine."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def submit(self, text: str, *options: str, run: str) -> str:
        """Submit a script; `run` is what `distloop-run` does in it. Returns the job's id."""
        commands = self.folder / "bin"
        commands.mkdir(exist_ok=True)
        (commands / "distloop-run").write_text(f"#!/bin/bash\n{run}\n")
        (commands / "distloop-run").chmod(0o755)
        script = self.folder / "script.sh"
        script.write_text(text)
        return self.do("sbatch", "--parsable", "--export=ALL", *options, str(script)).strip()

    def do(self, *command: str) -> str:
        environment = {**self.environment, "PATH": f"{self.folder}/bin:{self.environment['PATH']}"}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def facts(self, job: str) -> dict[str, str]:
        words = self.do("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, job: str, wanted, limit_secs: float = LIMIT_SECS) -> dict[str, str]:
        seen = {}

        def has_come() -> bool:
            seen.update(self.facts(job))
            came = wanted(seen)
            assert came or seen["JobState"] not in ("FAILED", "TIMEOUT"), f"{seen}\n{self.log()}"
            return came

        harness.until(has_come, limit_secs=limit_secs, every_secs=0.2)
        return seen

    def ended(self, job: str, limit_secs: float = LIMIT_SECS) -> dict[str, str]:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.until(job, lambda facts: facts["JobState"] in over, limit_secs)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*-*.log")))


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with real_slurm.cluster(folder, ("127.0.0.2", "127.0.0.3"), cpus=2, gpus=2) as environment:
        yield environment
    assert not real_slurm.left(folder)


@pytest.fixture
def slurm(daemons, tmp_path):
    yield Slurm(daemons, tmp_path)
    real_slurm.end_jobs(daemons)


# What stands for the supervisor where only the script is tested: it runs the command.
COMMAND_ONLY = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'


ONE_NODE = Settings(cpus_per_host=1)
TWO_NODES = Settings(num_hosts=2, cpus_per_host=2)


def script(*command, settings=TWO_NODES, grace=5):
    return emit("sbatch", settings, (), command, grace_secs=grace, max_restarts=3)


def test_slurm_accepts_what_an_emitted_script_asks_for(slurm):
    for settings in (Settings(num_hosts=2, gpus_per_host=2, time_limit="5"), Settings(partition="test")):
        text = script("true", settings=settings)
        assert "to start at" in slurm.do("sbatch", "--test-only", str(_written(slurm, text)))


def _written(slurm, text):
    (slurm.folder / "only.sh").write_text(text)
    return slurm.folder / "only.sh"


def test_there_is_one_supervisor_a_node_with_all_its_cores(slurm):
    what = "echo $SLURMD_NODENAME has $CUDA_VISIBLE_DEVICES and $SLURM_CPUS_ON_NODE cores"
    settings = Settings(num_hosts=2, gpus_per_host=2)
    slurm.ended(slurm.submit(script("bash", "-c", what, settings=settings), run=COMMAND_ONLY))
    said = sorted(line for line in slurm.log().splitlines() if " has " in line)
    assert said == [f"127.0.0.{index} has 0,1 and 2 cores" for index in (2, 3)]


@pytest.mark.parametrize("code", [0, 1, 65, 138])
def test_the_exit_code_of_the_run_is_that_of_the_job(slurm, code):
    # The other supervisor comes to the same end a little later, and nobody cuts it short.
    later = f"sleep $SLURM_NODEID; exit {code}"
    facts = slurm.ended(slurm.submit(script("bash", "-c", later), run=COMMAND_ONLY))
    assert facts["ExitCode"] == f"{code}:0"
    assert facts["Restarts"] == "0"


def test_a_supervisor_that_stays_behind_is_killed(slurm):
    stays = "if [ $SLURM_PROCID = 0 ]; then exit 69; fi; sleep 600"
    text = script("bash", "-c", stays).replace("--wait=35", "--wait=2")
    assert slurm.ended(slurm.submit(text, run=COMMAND_ONLY))["ExitCode"] == "137:0"


STOPS_TWICE = """
trap 'kill %1; exit 143' TERM
echo "start ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" = 2 ]; then exit 0; fi
sleep 600 & wait
"""


@pytest.mark.parametrize("array", [False, True])
def test_a_job_that_was_stopped_goes_back_to_the_queue_and_ends_well(slurm, array):
    job = slurm.submit(script("bash", "-c", STOPS_TWICE), *(["--array=7"] if array else []), run=COMMAND_ONLY)
    task = f"{job}_7" if array else job
    for count in (0, 1):
        slurm.until(task, lambda facts, count=count: facts["Restarts"] == str(count) and _started(slurm, count))
        slurm.do("scancel", "--signal=TERM", task)  # as --signal does before the limit: to all steps, not to the shell
    facts = slurm.ended(task)
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "2")
    assert slurm.log().count("goes back to the queue") == 2


def _started(slurm, count):
    return slurm.log().count(f"start {count}") == 2


def test_a_job_goes_back_no_more_often_than_was_said(slurm):
    settings = Settings(num_hosts=1, cpus_per_host=1, max_requeues=1)
    job = slurm.submit(script("bash", "-c", "exit 143", settings=settings), run=COMMAND_ONLY)
    facts = slurm.ended(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("143:0", "1")


def test_a_job_that_a_person_cancels_does_not_come_back(slurm):
    job = slurm.submit(script("bash", "-c", STOPS_TWICE), run=COMMAND_ONLY)
    slurm.until(job, lambda _: _started(slurm, 0))
    slurm.do("scancel", job)
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    slurm.until(job, lambda facts: facts["JobState"] == "CANCELLED" and "EndTime" in facts)
    assert "goes back" not in slurm.log()


def test_the_time_limit_stops_the_supervisors_first(slurm):
    settings = Settings(num_hosts=2, cpus_per_host=2, time_limit="1", max_requeues=0)
    job = slurm.submit(script("bash", "-c", STOPS_TWICE, settings=settings), run=COMMAND_ONLY)
    facts = slurm.ended(job, limit_secs=120)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "143:0")  # and not TIMEOUT


def submit_training(slurm, workdir):
    """Submit a run of two supervisors, both on one node: nodes of one machine would share their ports."""
    train = ("-m", "launch.train", "--task=mnist_tutorial", "--train_steps=1000", "--checkpoint_every_steps=200")
    text = script(sys.executable, *train, f"--workdir={workdir}", settings=ONE_NODE, grace=60)
    run = f'export PYTHONPATH={harness.ROOT}; exec {sys.executable} -m launch.run "$@"'
    job = slurm.submit(text, "--ntasks-per-node=2", run=run)
    slurm.until(job, lambda _: checkpoints(workdir), limit_secs=180)
    return job


def checkpoints(workdir):
    return sorted(path.name for path in workdir.glob("checkpoints/step_*"))


def test_a_training_of_two_supervisors_stops_comes_back_and_ends(slurm, tmp_path):
    workdir = tmp_path / "run"
    job = submit_training(slurm, workdir)
    slurm.do("scancel", "--signal=TERM", job)
    facts = slurm.ended(job, limit_secs=300)
    assert facts["ExitCode"] == "0:0", slurm.log()
    assert facts["Restarts"] == "1"
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 1000


def test_a_training_that_a_person_cancels_leaves_a_checkpoint(slurm, tmp_path):
    job = submit_training(slurm, tmp_path / "run")
    slurm.do("scancel", job)
    pattern = r"stopped after step (\d+) of 1000"
    slurm.until(job, lambda _: re.search(pattern, slurm.log()))
    (step,) = re.findall(pattern, slurm.log())
    assert checkpoints(tmp_path / "run")[-1] == f"step_{int(step):08}"
    assert slurm.ended(job)["JobState"] == "CANCELLED"
    assert "goes back" not in slurm.log()
