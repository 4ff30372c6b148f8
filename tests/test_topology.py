import json
import subprocess
import sys

import pytest

from distloop.cluster import Cluster
from distloop.errors import UsageError
from distloop.launcher.topology import Place, Placement, Topology, resolve

ALONE = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
ALONE |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
PAIR = {**ALONE, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
JOBS = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
TF_CONFIG = {"TF_CONFIG": json.dumps({"cluster": JOBS, "task": {"type": "worker", "index": 0}})}
EVALUATOR = {"TF_CONFIG": json.dumps({"cluster": JOBS, "task": {"type": "evaluator", "index": 0}})}
AB = ("a", "b")


def resolved(environment=None, *, gpus=(), here="", **flags):
    return resolve(Placement(**flags), environment or {}, gpus=gpus, is_here=lambda host: host in here.split())


def test_ranks_follow_the_order_of_places():
    topology = Topology((Place("a", (1, 2)), Place("b", (1,)), Place("a", (3, 4))), index=2)
    assert topology.addresses == ("a:1", "a:2", "b:1", "a:3", "a:4")
    assert (topology.first_rank, topology.here) == (3, Place("a", (3, 4)))
    assert topology.neighbours == (2, 1)


def test_local_workers_get_ports_at_each_attempt():
    topology = resolved(workers="2")
    assert topology.needs_ports
    assert topology.with_ports([5, 6]) == Topology((Place("127.0.0.1", (5, 6)),))
    assert not topology.with_ports([5, 6]).needs_ports


@pytest.mark.parametrize(
    ("flags", "environment", "places", "index"),
    [
        ({}, {}, [Place("127.0.0.1", (0,))], 0),
        ({"workers": "3"}, {}, [Place("127.0.0.1", (0, 0, 0))], 0),
        ({}, ALONE, [Place("127.0.0.1", (0,))], 0),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, [Place("127.0.0.1", (0,))], 0),
        ({}, PAIR, [Place("n1", (24117,)), Place("n2", (24117,))], 0),
        ({"cluster": "slurm"}, ALONE, [Place("n1", (24117,))], 0),
        ({"cluster": "slurm", "port": 80}, PAIR, [Place("n1", (80,)), Place("n2", (80,))], 0),
        ({"cluster": "local"}, PAIR, [Place("127.0.0.1", (0,))], 0),
        ({"hosts": AB, "host_index": 1, "port": 80}, PAIR, [Place("a", (80,)), Place("b", (80,))], 1),
        ({"hosts": AB, "host_index": 0, "port": 80, "workers": "2"}, {}, [Place(host, (80, 81)) for host in AB], 0),
        ({"hosts": ("a:5", "b:6"), "host_index": 0}, {}, [Place("a", (5,)), Place("b", (6,))], 0),
        ({"hosts": ("a:5", "a:6"), "host_index": 1}, {}, [Place("a", (5,)), Place("a", (6,))], 1),
        ({"hosts": ("::1", "[::2]", "[::3]:9"), "host_index": 0, "port": 5}, {},
         [Place("[::1]", (5,)), Place("[::2]", (5,)), Place("[::3]", (9,))], 0),
        ({}, {"TF_CONFIG": ""}, [Place("127.0.0.1", (0,))], 0),
        ({"cluster": "local"}, TF_CONFIG, [Place("127.0.0.1", (0,))], 0),
        ({"cluster": "tpu"}, TF_CONFIG, [Place("127.0.0.1", (0,))], 0),
        ({"cluster": "hosts", "hosts": AB, "host_index": 0, "port": 9}, TF_CONFIG, [Place(h, (9,)) for h in AB], 0),
    ],
)  # fmt: skip
def test_what_flags_and_environment_mean(flags, environment, places, index):
    assert resolved(environment, **flags) == Topology(tuple(places), index)


def test_a_tf_config_that_is_set_stays_as_it_is():
    topology = resolved(TF_CONFIG)
    assert topology.addresses == ("a:1", "b:1", "c:1")
    assert (topology.first_rank, topology.needs_ports, topology.is_evaluator) == (1, False, False)
    assert topology.given == Cluster(("a:1", "b:1", "c:1"), 1)


def test_an_evaluator_is_alone():
    topology = resolved(EVALUATOR)
    assert (topology.is_evaluator, topology.needs_ports, len(topology.addresses)) == (True, False, 1)


@pytest.mark.parametrize(
    ("flags", "environment", "here", "index"),
    [
        ({"hosts": AB}, {}, "b", 1),
        ({"hosts": ("x:5", "[::1]:5")}, {}, "[::1]", 1),
        ({"hosts": AB}, {"JOB_COMPLETION_INDEX": "1"}, "", 1),
        ({"hosts": AB}, {"JOB_COMPLETION_INDEX": "1"}, "a", 1),
        ({"hosts": AB, "host_index": 0}, {"JOB_COMPLETION_INDEX": "1"}, "b", 0),
    ],
)
def test_a_host_finds_itself_among_hosts(flags, environment, here, index):
    assert resolved(environment, here=here, **flags).index == index


def test_a_derived_port_is_the_same_on_all_hosts_and_another_for_another_run():
    def port(*hosts, workdir="runs/a"):
        return resolved(hosts=hosts, host_index=0, workdir=workdir).here.ports[0]

    script = (
        "from distloop.launcher.topology import *; print(resolve(Placement(hosts=('a', 'b'), host_index=1, "
        "workdir='runs/a'), {}, gpus=[], is_here=bool).here.ports[0])"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert 20000 <= port("a", "b") == int(elsewhere) < 30000
    assert len({port("a", "b"), port("a", "c"), port("a", "b", workdir="runs/b")}) == 3


def test_one_worker_for_each_gpu():
    assert len(resolved(workers="per_gpu", gpus=["6", "7"]).here.ports) == 2


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ({"workers": "0"}, {}, "workers is '0'; expected a number of at least 1, or per_gpu"),
        ({"workers": "two"}, {}, "workers is 'two'; expected a number"),
        ({"workers": "-1"}, {}, "workers is '-1'; expected a number"),
        ({"workers": "per_gpu"}, {}, "workers is per_gpu, but this host shows no GPU"),
        ({"workers": "2"}, TF_CONFIG, "workers is 2, but TF_CONFIG is set, which is of one process"),
        ({"workers": "2", "cluster": "tpu"}, {}, "workers is 2, but one process drives all TPU cores of a host"),
        ({"cluster": "moon"}, {}, "cluster is 'moon'; expected one of auto, local, hosts"),
        ({"cluster": "hosts"}, {}, "cluster is hosts, but none are given; add --hosts=a,b"),
        ({"cluster": "tf_config"}, {}, "cluster is tf_config, but TF_CONFIG is not set"),
        ({"cluster": "slurm"}, {}, "SLURM_STEP_NODELIST is not set, so this is no task of a Slurm step"),
        ({"cluster": "local", "hosts": AB}, {}, "hosts is given, but cluster is local; drop --hosts"),
        ({"hosts": AB}, TF_CONFIG, "hosts is given, but cluster is tf_config (TF_CONFIG is set); drop --hosts, or add"),
        ({"host_index": 0}, {}, "host_index is 0, but cluster is local; it goes with --hosts"),
        ({"host_index": 0}, PAIR, "host_index is 0, but cluster is slurm (srun started this)"),
        ({"port": 5}, {}, "port is 5, but cluster is local, which needs none"),
        ({"port": 0, "hosts": AB}, {}, "port is 0; expected 1 to 65535"),
        ({"port": 65536, "hosts": AB}, {}, "port is 65536; expected 1 to 65535"),
        ({"port": 65535, "hosts": AB, "workers": "2", "host_index": 0}, {}, "port is 65535, too high for 2 workers"),
        ({"hosts": ("a", "a"), "host_index": 0}, {}, "hosts (a, a) lists one twice"),
        (
            {"hosts": ("a:5", "a:6"), "workers": "2", "host_index": 0},
            {},
            "give 2 workers the address a:6; leave 2 ports",
        ),
        ({"hosts": ("a", "")}, {}, "hosts has ''; expected a name or an address, or one with a port"),
        ({"hosts": ("a", "b:x")}, {}, "hosts has 'b:x'; expected a name or an address"),
        ({"hosts": ("a", "http://b")}, {}, "hosts has 'http://b'; expected a name or an address"),
        ({"hosts": AB, "host_index": 2}, {}, "host_index is 2, but there are 2 hosts (a, b); count them from 0"),
        ({"hosts": AB, "host_index": -1}, {}, "host_index is -1, but there are 2 hosts"),
        ({"hosts": AB}, {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX is 2, but there are 2 hosts"),
        ({"hosts": AB}, {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX is 'x'; expected the index"),
        (
            {"hosts": AB},
            {},
            "hosts are a, b, and none of them is this machine; say which one this is with --host_index",
        ),
        ({"hosts": ("me", "me_too")}, {}, "hosts are me, me_too, and 2 of them are this machine"),
    ],
)
def test_a_contradiction_is_told_in_a_sentence(flags, environment, sentence):
    with pytest.raises(UsageError) as refusal:
        resolved(environment, here="me me_too", **flags)
    assert sentence in str(refusal.value)
