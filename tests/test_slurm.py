"""Node lists and steps as a real Slurm made them; `tests/record_slurm.py` has recorded them."""

import json
from pathlib import Path

import pytest

from distloop.errors import UsageError
from distloop.launcher.devices import local_gpus
from distloop.launcher.plan import make_plan
from distloop.launcher.slurm import expand, in_step, read_step
from distloop.launcher.topology import Placement, resolve

RECORD = json.loads((Path(__file__).with_name("data") / "slurm.json").read_text())
READABLE = {form: hosts for form, hosts in RECORD["forms"].items() if hosts}
# The place of a task can be known for all kinds of steps but this one.
STEPS = {name: step["tasks"] for name, step in RECORD["steps"].items() if name not in ("no step", "ranks by a list")}
UNEVEN = STEPS["uneven tasks"]


def tf_configs(name, changes=None, **flags):
    """Return what each task of a recorded step starts: (TF_CONFIG, CUDA_VISIBLE_DEVICES) of its workers."""
    started = []
    for task in [{**task, **(changes or {})} for task in STEPS[name]]:
        gpus = local_gpus(task)
        topology = resolve(Placement(**flags), task, gpus=gpus, is_here=lambda _: False)
        workers = make_plan(topology, ["train"], task, gpus=gpus, cores=8)
        started += [{**task, **worker.environment} for worker in workers]
    return [(json.loads(each["TF_CONFIG"]), each.get("CUDA_VISIBLE_DEVICES")) for each in started]


def test_enough_node_lists_are_recorded():
    assert len(READABLE) >= 30


@pytest.mark.parametrize("form", READABLE)
def test_a_node_list_is_read_as_slurm_reads_it(form):
    assert expand(form) == READABLE[form]


@pytest.mark.parametrize(
    ("form", "hosts"),
    [
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("h[1-2].example.org", ["h1.example.org", "h2.example.org"]),
        ("r[01-02]n[1,3]-x", ["r01n1-x", "r01n3-x", "r02n1-x", "r02n3-x"]),
    ],
)
def test_names_may_go_on_after_a_bracket(form, hosts):
    assert expand(form) == hosts


@pytest.mark.parametrize(
    ("form", "part"),
    [
        *[("n[3-1]", "3-1"), ("n[]", ""), ("n[a-b]", "a-b"), ("n[1,]", ""), ("n[,1]", ""), ("n[1;2]", "1;2")],
        *[("n[-3]", "-3"), ("n[1-]", "1-"), ("n[1--3]", "1--3"), ("n[0x1-0x3]", "0x1-0x3"), ("n[1-70000]", "1-70000")],
    ],
)
def test_a_malformed_range_is_named(form, part):
    with pytest.raises(UsageError) as refusal:
        expand(form)
    assert f"the node list {form!r} has [{part}]; expected a number or a range" in str(refusal.value)


@pytest.mark.parametrize("form", ["", ",", "a,,b", "a,", "n[1-2", "n1-2]", "n[[1-3]]", "n[1-3]]"])
def test_a_malformed_node_list_is_named(form):
    with pytest.raises(UsageError) as refusal:
        expand(form)
    assert f"the node list {form!r} cannot be read" in str(refusal.value)


@pytest.mark.parametrize("name", STEPS)
def test_every_task_knows_where_all_tasks_are(name):
    hosts = tuple(task["SLURMD_NODENAME"] for task in STEPS[name])
    for rank, task in enumerate(STEPS[name]):
        step = read_step(task)
        assert (step.hosts, step.rank) == (hosts, rank)


@pytest.mark.parametrize(
    ("name", "several"),
    [("one task a node", True), ("a heterogeneous job", True), ("a step on one node of three", False)],
)
def test_a_task_among_several_is_found_without_a_flag(name, several):
    assert all(in_step(task) == several for task in STEPS[name])


def test_a_batch_script_is_no_task_among_several():
    assert not in_step(RECORD["steps"]["no step"]["tasks"][0])
    assert not in_step({"SLURM_JOB_ID": "18", "SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_NODEID": "0"})


def test_tf_config_of_each_task():
    addresses = ["n8:20007", "n9:20007", "n10:20007"]
    assert tf_configs("one task a node") == [
        ({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}, None) for rank in range(3)
    ]


def test_tasks_of_one_node_have_ports_of_their_own():
    configs = [config for config, _ in tf_configs("cyclic ranks", port=5000)]
    assert configs[0]["cluster"]["worker"] == ["n8:5000", "n9:5000", "n8:5001", "n8:5002"]
    assert [config["task"]["index"] for config in configs] == [0, 1, 2, 3]
    assert len({str(config["cluster"]) for config in configs}) == 1


def test_a_task_may_start_several_workers():
    configs = [config for config, _ in tf_configs("several tasks a node", port=5000, workers="2")]
    assert configs[0]["cluster"]["worker"] == [f"{host}:{5000 + k}" for host in ("n9", "n10") for k in range(4)]
    assert [config["task"]["index"] for config in configs] == list(range(8))


@pytest.mark.parametrize(
    ("name", "flags", "gpus"),
    [
        ("GPUs of a node", {}, ["0,1", "0,1"]),
        ("GPUs of a node", {"workers": "per_gpu"}, ["0", "1", "0", "1"]),
        ("GPUs of a task", {}, ["0", "1", "0", "1"]),
        ("GPUs bound by hand", {}, ["3", "1"]),
        ("all tasks see all GPUs", {}, ["0,1", "2,3"]),
        ("all tasks see all GPUs", {"workers": "per_gpu"}, ["0", "1", "2", "3"]),
    ],
)
def test_tasks_of_one_node_drive_different_gpus(name, flags, gpus):
    assert [visible for _, visible in tf_configs(name, **flags)] == gpus


@pytest.mark.parametrize("visible", ["6,7", "GPU-7a,GPU-02"])
def test_gpus_keep_the_names_that_slurm_gave_them(visible):
    changes = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": "2"}
    assert [own for _, own in tf_configs("all tasks see all GPUs", changes)] == visible.split(",")


def test_tasks_that_cannot_share_a_gpu_are_refused():
    with pytest.raises(UsageError, match=r"1 GPU\(s\) \(0\) cannot be shared out to 2 processes on this host"):
        tf_configs("a heterogeneous job")


def test_a_requeued_job_has_its_ports_again_and_tasks_of_an_array_have_others():
    def ports(**changes):
        task = {**UNEVEN[0], **changes}
        return [place.ports for place in resolve(Placement(), task, gpus=[], is_here=lambda _: False).places]

    assert ports(SLURM_RESTART_COUNT="1") == ports()
    ids = {"SLURM_ARRAY_JOB_ID": "19", "SLURM_JOB_ID": "20"}
    assert ports(**ids, SLURM_ARRAY_TASK_ID="3") != ports(**{**ids, "SLURM_JOB_ID": "19"}, SLURM_ARRAY_TASK_ID="4")
    assert ports(SLURM_STEP_ID="1") != ports()
    assert all(20000 <= port < 30000 for each in ports() for port in each)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set, so this is no task of a Slurm step"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'; expected a whole number"),
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID is 5, but the step has 5 tasks"),
        ({"SLURM_PROCID": "3"}, "SLURM_NODEID is 0, but should be 1 for task 3, on n9"),
        ({"SLURM_PROCID": "1"}, "SLURM_LOCALID is 0, but should be 1 for task 1, on n8"),
        ({"SLURM_GTIDS": "0,2,4"}, "SLURM_GTIDS is 0,2,4, but should be 0,1,2"),
        ({"SLURM_STEP_NUM_TASKS": "6"}, "SLURM_STEP_NUM_TASKS is 6, but should be 5"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x3"}, "SLURM_STEP_TASKS_PER_NODE is '1(x3'; expected counts"),
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, "expected counts of tasks such as 2(x3),1"),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "3,2"},
            "has 3 nodes (n8, n9, n10), but SLURM_STEP_TASKS_PER_NODE counts tasks of 2",
        ),
        ({"SLURM_STEP_NODELIST": "n[8-"}, "the node list 'n[8-' cannot be read"),
        ({"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_DISTRIBUTION is arbitrary, from which the place of other tasks"),
        ({"SLURM_DISTRIBUTION": "cyclic"}, "SLURM_GTIDS is 0,1,2, but should be 0,3,4"),
        ({"SLURM_HET_SIZE": "2"}, "but the components named in SLURM_JOB_NODELIST_HET_GROUP_* have none of them"),
        (
            {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n9", "SLURM_JOB_NODELIST_HET_GROUP_1": "n11"},
            "have n9 of them; give each component its nodes",
        ),
    ],
)
def test_variables_that_contradict_each_other_are_an_error_and_no_guess(changes, sentence):
    task = {name: value for name, value in {**UNEVEN[0], **changes}.items() if value is not None}
    with pytest.raises(UsageError) as refusal:
        read_step(task)
    assert sentence in str(refusal.value)


def test_a_distribution_may_say_more_than_that_of_nodes():
    assert read_step({**UNEVEN[0], "SLURM_DISTRIBUTION": "block:cyclic,NoPack"}) == read_step(UNEVEN[0])
