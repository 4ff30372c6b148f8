import json
import os
import subprocess
import sys

import pytest

from distloop.cluster import Cluster
from distloop.errors import UsageError
from distloop.launcher.devices import local_gpus
from distloop.launcher.plan import THREAD_SETTINGS, Worker, make_plan, shell_line
from distloop.launcher.processes import free_ports
from distloop.launcher.topology import Place, Topology
from tests import harness

ONE = Topology((Place("a", (1,)),))
TWO = Topology((Place("a", (1, 2)),))
FOUR = Topology((Place("a", (1, 2)), Place("b", (1, 2))), index=1)
NEIGHBOUR = Topology((Place("a", (1, 2)), Place("a", (3, 4))), index=1)


def planned(topology, environment=None, *, gpus=(), cores=8):
    return make_plan(topology, ["train", "--x"], environment or {}, gpus=gpus, cores=cores)


def settings(plan, name):
    return [worker.environment.get(name, "as it is") for worker in plan]


@pytest.mark.parametrize(
    ("environment", "files", "gpus"),
    [
        ({}, [], []),
        ({}, ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset"], ["0", "1"]),
        ({}, ["nvidia3"], ["0"]),  # a container that has one of four
        ({"CUDA_VISIBLE_DEVICES": "6,7"}, ["nvidia0"], ["6", "7"]),
        ({"CUDA_VISIBLE_DEVICES": "7, 6"}, [], ["7", "6"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ["nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, [], ["2"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c,GPU-52f"}, [], ["GPU-8932f937-d72c", "GPU-52f"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-8932/1/0,MIG-52f"}, [], ["MIG-GPU-8932/1/0", "MIG-52f"]),
    ],
)
def test_the_gpus_of_a_host_are_those_that_cuda_would_see(environment, files, gpus, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    assert local_gpus(environment, devices=tmp_path) == gpus


def test_a_gpu_that_is_listed_twice_is_refused():
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES is 0,1,0, which names a GPU twice"):
        local_gpus({"CUDA_VISIBLE_DEVICES": "0,1,0"})


def test_one_worker_runs_the_command_as_it_is():
    assert planned(ONE, gpus=["0", "1"]) == [Worker(0, ("train", "--x"), {})]
    assert planned(ONE, {"TF_CONFIG": "{}"})[0].environment == {"TF_CONFIG": None}


def test_several_workers_are_told_apart_by_tf_config():
    plan = planned(FOUR)
    assert [worker.rank for worker in plan] == [2, 3]
    addresses = ["a:1", "a:2", "b:1", "b:2"]
    assert [json.loads(text) for text in settings(plan, "TF_CONFIG")] == [
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}} for rank in (2, 3)
    ]


def test_a_tf_config_that_is_set_and_its_process_are_left_alone():
    given = Topology((Place("a", (1,)), Place("a", (2,))), 1, Cluster(("a:1", "a:2"), 1))
    assert planned(given, {"TF_CONFIG": "{}"}, gpus=["0", "1"]) == [Worker(1, ("train", "--x"), {})]


@pytest.mark.parametrize(
    ("topology", "gpus", "visible"),
    [
        (ONE, ["6", "7"], ["as it is"]),
        (TWO, [], ["as it is"] * 2),
        (TWO, ["6", "7"], ["6", "7"]),
        (TWO, ["0", "1", "2", "3"], ["0,1", "2,3"]),
        (FOUR, ["3", "1"], ["3", "1"]),  # on another host: all are this supervisor's
        (NEIGHBOUR, ["0", "1", "2", "3"], ["2", "3"]),
        (TWO, ["MIG-a", "MIG-b"], ["MIG-a", "MIG-b"]),
    ],
)
def test_workers_of_a_host_see_disjoint_gpus(topology, gpus, visible):
    assert settings(planned(topology, gpus=gpus), "CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(("topology", "gpus"), [(TWO, ["0"]), (TWO, ["0", "1", "2"]), (NEIGHBOUR, ["0", "1"])])
def test_gpus_that_cannot_be_shared_out_equally_are_refused(topology, gpus):
    with pytest.raises(UsageError, match=r"GPU\(s\) \(.*\) cannot be shared out to 2 processes on this host; start a"):
        planned(topology, gpus=gpus)


@pytest.mark.parametrize(
    ("topology", "cores", "environment", "threads"),
    [
        (ONE, 8, {}, "as it is"),
        (TWO, 8, {}, "4"),
        (TWO, 3, {}, "1"),
        (TWO, 1, {}, "1"),
        (FOUR, 8, {}, "4"),
        (NEIGHBOUR, 8, {}, "2"),
        (NEIGHBOUR, 4, {"SLURM_CPUS_ON_NODE": "8"}, "2"),  # Slurm has bound this task to 4 of 8
    ],
)
def test_workers_of_a_host_share_its_cores(topology, cores, environment, threads):
    for name in THREAD_SETTINGS:
        assert set(settings(planned(topology, environment, cores=cores), name)) == {threads}


def test_workers_speak_to_each_other_without_the_proxy_of_the_environment():
    proxy = {"http_proxy": "http://proxy:3128", "no_proxy": "c"}
    assert settings(planned(FOUR, proxy), "no_grpc_proxy") == ["c,a,b"] * 2
    assert settings(planned(FOUR), "no_grpc_proxy") == ["as it is"] * 2
    assert planned(ONE, proxy)[0].environment == {}
    given = Topology((Place("a", (1,)), Place("b", (1,))), 1, Cluster(("a:1", "b:1"), 1))
    assert planned(given, proxy)[0].environment == {"no_grpc_proxy": "c,a,b"}


def test_thread_settings_that_somebody_made_stay():
    assert settings(planned(TWO, {THREAD_SETTINGS[0]: "7"}), THREAD_SETTINGS[0]) == ["as it is"] * 2


ODD = [
    "it's",
    'a "b"',
    "$HOME",
    "`id`",
    "a\nb",
    "",
    "*",
    "\\",
    "-x",
    "ä",
    ";",
    "&&",
    "--flag=a b",
    "!",
    "~",
    "#",
    "a=b",
]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_shell_line_runs_exactly_that_command(shell):
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    changes = {f"ODD_{number}": value for number, value in enumerate(ODD)}
    worker = Worker(0, (sys.executable, "-c", tell, *ODD), {**changes, "UNSET": None, "KEPT_NOT": "new"})
    environment = {**os.environ, "UNSET": "x", "KEPT": "old", "KEPT_NOT": "old"}
    out = subprocess.run(
        [shell, "-c", shell_line(worker)], env=environment, capture_output=True, text=True, check=True
    ).stdout
    arguments, seen = json.loads(out)
    assert arguments == ODD
    assert {name: seen[name] for name in changes} == changes
    assert ("UNSET" in seen, seen["KEPT"], seen["KEPT_NOT"]) == (False, "old", "new")


def test_a_command_that_needs_no_change_is_its_own_line():
    assert shell_line(Worker(0, ("train", "--workdir=a b"), {})) == "train '--workdir=a b'"


@pytest.mark.slow
def test_the_lines_of_a_plan_pasted_into_a_shell_train(tmp_path):
    run = tmp_path / "a run"
    train = [sys.executable, "-m", "distloop", "--task=mnist_cnn", "--train_steps=3", f"--workdir={run}"]
    topology = Topology((Place("127.0.0.1", tuple(free_ports(2))),))
    lines = [shell_line(worker) for worker in make_plan(topology, train, os.environ, gpus=[], cores=2)]
    pasted = "".join(f"{line} &\n" for line in lines) + "wait -n && wait -n\n"
    process = subprocess.Popen(["bash", "-c", pasted], cwd=harness.ROOT, start_new_session=True)
    try:
        assert process.wait(120) == 0
    finally:
        harness.kill(process)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
