import functools
import json
import os
import re
import time

import keras
import tensorflow as tf

import distloop
from distloop import Task, preflight, runtime
from distloop.cluster import Cluster, from_tf_config
from distloop.errors import PreflightError, UsageError
from distloop.preflight import check_reduction, check_workers, source_version
from distloop.strategies import make_strategy
from tests import harness, toy

ALONE = Cluster()


def report(check):
    """Print what a check raises, as JSON, or null."""
    try:
        check()
        print(json.dumps(None))
    except (PreflightError, UsageError) as error:
        print(json.dumps(str(error)))


def said_by_each_worker(function, *, workers=2):
    """Call a function of this module in each worker; return the JSON lines that each printed."""
    module, name = function.__module__, function.__name__
    results = harness.run_workers(["-c", f"from {module} import {name}; {name}()"], workers=workers)
    for code, out, err in results:
        assert code == 0, out + err
    return [[json.loads(line) for line in out.splitlines()] for _, out, _ in results]


def multiworker(replicas=None):
    runtime.initialize(replicas=replicas, seed=0, precision="float32")
    workers = from_tf_config(os.environ["TF_CONFIG"])
    return make_strategy("multiworker", cluster=workers, replicas=replicas), workers


def test_a_right_reduction_passes(strategy):
    check_reduction(strategy, ALONE)


def test_one_worker_has_nobody_to_differ_from():
    check_workers(ALONE, {"flags": {"seed": 0}})


class AddsOneOnReplica1(tf.distribute.CrossDeviceOps):
    """Reduce as TensorFlow does and give replica 1 a sum that is wrong in its last element."""

    def __init__(self):
        super().__init__()
        self.right = tf.distribute.ReductionToOneDevice()

    def reduce_implementation(self, *arguments):
        return self.right.reduce_implementation(*arguments)

    def batch_reduce_implementation(self, *arguments):
        wrong = []
        for sums in self.right.batch_reduce_implementation(*arguments):
            last = tf.one_hot(tf.size(sums.values[1]) - 1, tf.size(sums.values[1]))
            wrong.append(type(sums)((sums.values[0], sums.values[1] + last, *sums.values[2:])))
        return wrong


def wrong_on_replica_1():
    runtime.initialize(replicas=3, seed=0, precision="float32")
    devices = [cpu.name for cpu in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=AddsOneOnReplica1())
    report(lambda: check_reduction(strategy, ALONE))


def test_a_replica_with_a_wrong_sum_is_named_with_what_reduced():
    # in a process of its own, which makes no other strategy over these devices
    code, out, err = harness.run("-c", "from tests.test_preflight import wrong_on_replica_1 as f; f()")
    assert code == 0, out + err
    message = json.loads(out)
    assert "the all-reduce over 3 replicas by AddsOneOnReplica1 gave replica 1 a wrong sum of known numbers" in message
    assert "use another --strategy or fewer replicas" in message


def wrong_on_worker_1():
    strategy, workers = multiworker(replicas=2)
    ops = strategy.extended._cross_device_ops
    right = ops._all_reduce
    if workers.index == 1:  # its replica 1 forgets what others have
        ops._all_reduce = lambda op, value, replica, options: tf.nest.map_structure(
            tf.identity, [right(op, value, replica, options), value][replica]
        )
    report(lambda: check_reduction(strategy, workers))


def test_every_worker_is_told_of_a_wrong_sum_on_one_of_them():
    for lines in said_by_each_worker(wrong_on_worker_1):
        assert "over 4 replicas by CollectiveAllReduce (RING) gave replica 3 a wrong sum" in lines[-1]


def compare_workers():
    strategy, workers = multiworker()
    index = workers.index
    same = {"flags": {"seed": 0, "batch": [8]}, "code": source_version(toy.make_task), "checkpoint": 8}
    report(lambda: check_reduction(strategy, workers))
    report(lambda: check_workers(workers, same))
    for other in (
        {"flags": {"seed": index, "batch": [8]}},
        {"flags": f"--seed={index}"},
        {"code": f"distloop 0.{index}.0"},
        {"checkpoint": 8 if index == 0 else 0},
        {"weather": "sun" if index == 0 else "rain"},
        {"extra": "of one release"} if index == 2 else {},
        {"checkpoint": index, "flags": {"seed": index}},
    ):
        report(lambda other=other: check_workers(workers, {**same, **other}))


def test_workers_that_would_not_do_the_same_are_all_told_the_first_difference():
    for lines in said_by_each_worker(compare_workers, workers=3):
        assert lines[:2] == [None, None]
        cure = "; start all workers with the same"
        assert lines[2:] == [
            f"worker 1 has other flags than worker 0 (seed=1, not seed=0), and worker 2 differs too{cure} flags.",
            f"worker 1 has other flags than worker 0 (--seed=1, not --seed=0), and worker 2 differs too{cure} flags.",
            "worker 1 runs other code than worker 0 (distloop 0.1.0, not distloop 0.0.0), and worker 2 differs too; "
            "install the same code for all workers.",
            "worker 1 found a checkpoint of step 0, worker 0 of step 8, and worker 2 differs too; "
            "give all workers the same --workdir, on storage that they share.",
            f"worker 1 has weather rain, worker 0 sun, and worker 2 differs too{cure} weather.",
            f"worker 2 has extra of one release, worker 0 nothing{cure} extra.",
            f"worker 1 has other flags than worker 0 (seed=1, not seed=0), and worker 2 differs too{cure} flags.",
        ]


def other_number_of_replicas():
    workers = from_tf_config(os.environ["TF_CONFIG"])
    strategy, workers = multiworker(replicas=1 + workers.index)
    report(lambda: check_workers(workers, {"replicas": strategy.num_replicas_in_sync // workers.num_workers}))


def test_workers_with_other_numbers_of_replicas_are_told_before_a_collective_waits_for_ever():
    for lines in said_by_each_worker(other_number_of_replicas):
        assert lines == ["worker 1 has 2 replicas, worker 0 1; give all workers the same --replicas and as many GPUs."]


def stay_away():
    _, workers = multiworker()
    preflight.PATIENCE_SECS = 2
    if workers.index == 0:
        report(lambda: check_workers(workers, {"flags": "--seed=0"}))
    else:
        time.sleep(4)


def test_a_worker_that_does_not_come_is_named():
    (line,), _ = said_by_each_worker(stay_away)
    assert line.startswith("worker 1 said nothing for 2 s before the first step")


def disagree():
    _, workers = multiworker()
    check_workers(workers, {"flags": f"--seed={workers.index}"})


def test_workers_that_differ_all_end_with_the_sentence():
    results = harness.run_workers(["-c", "from tests.test_preflight import disagree; disagree()"], workers=2)
    for code, out, err in results:
        sentence = (
            "worker 1 has other flags than worker 0 (--seed=1, not --seed=0); start all workers with the same flags."
        )
        assert (code, err.splitlines()[-1]) == (1, f"distloop.errors.UsageError: {sentence}"), out + err


def step(state, batch):
    return {}  # only its source is looked at


def test_the_version_of_the_code_is_that_of_the_file_that_defines_the_train_step(tmp_path):
    version = source_version(Task(step, step, dict))
    versions = rf"distloop {distloop.__version__} \w{{12}}, tensorflow {tf.__version__}, keras {keras.__version__}"
    assert re.fullmatch(versions + r", test_preflight\.py \w{12}", version)
    assert version == source_version(step) == source_version(functools.partial(step, None))
    assert version == source_version(tf.function(step))
    assert version != source_version(toy.make_task)

    namespace = {}
    exec("def no_file(state, batch): ...", namespace)
    for without_source in (namespace["no_file"], print, functools.partial(print)):
        assert re.fullmatch(versions + ", source unknown", source_version(without_source))
