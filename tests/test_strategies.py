import json
import os

import pytest
import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from distloop import runtime
from distloop.cluster import Cluster, from_tf_config
from distloop.errors import UsageError
from distloop.strategies import choose, local_devices, make_strategy
from tests import harness

ALONE, TWO = Cluster(), Cluster(("a:1", "b:1"), 0)


@pytest.mark.parametrize(
    ("cluster", "replicas", "chosen"),
    [(ALONE, None, "default"), (ALONE, 1, "default"), (ALONE, 2, "mirrored"), (TWO, None, "multiworker")],
)
def test_auto_picks_from_what_is_there(cluster, replicas, chosen):
    assert choose("auto", cluster=cluster, replicas=replicas) == chosen


@pytest.mark.parametrize(
    ("name", "cluster", "replicas", "sentence"),
    [
        ("mirrored", TWO, None, "strategy is mirrored, but TF_CONFIG lists 2 workers"),
        ("default", ALONE, 2, "strategy default has one replica, not 2; use --strategy=mirrored"),
        ("one_device", ALONE, 4, "strategy one_device has one replica, not 4"),
        (
            "multiworker",
            ALONE,
            None,
            "there is no TF_CONFIG with several workers; start it with python -m launch.run",
        ),
        ("tpu", ALONE, None, "strategy is tpu, but there is no TPU here"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(name, cluster, replicas, sentence):
    with pytest.raises(UsageError) as refusal:
        make_strategy(choose(name, cluster=cluster, replicas=replicas), cluster=cluster, replicas=replicas)
    assert sentence in str(refusal.value)


def test_a_multiworker_process_drives_all_its_gpus_or_is_refused(monkeypatch):
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [gpu, gpu])  # there are none here
    with pytest.raises(UsageError, match=r"replicas is 1, but a multiworker process drives its 2 GPU\(s\)"):
        make_strategy("multiworker", cluster=TWO, replicas=1)


def test_strategies_run_on_the_devices_they_say(mirrored):
    assert local_devices(tf.distribute.get_strategy()) == ["CPU:0"]
    assert local_devices(make_strategy("one_device", cluster=ALONE, replicas=None)) == ["CPU:0"]
    assert local_devices(mirrored) == ["CPU:0", "CPU:1"]


def test_devices_that_have_started_cannot_be_changed_and_that_is_said():
    tf.zeros([1])
    with pytest.raises(UsageError, match="TensorFlow has already started its devices in this process"):
        runtime.initialize(replicas=5, seed=0, precision="float32")


def rehearse():
    """Run in each of two processes, with two replicas: several collectives of each kind a call, shared-out batches."""
    before = CollectiveAllReduceExtended._initialize_local_devices
    runtime.initialize(replicas=2, seed=0, precision="float32")
    cluster = from_tf_config(os.environ["TF_CONFIG"])
    strategy = make_strategy("multiworker", cluster=cluster, replicas=2)
    assert CollectiveAllReduceExtended._initialize_local_devices is before
    contexts = []

    def rows(context):
        contexts.append(context)
        begin = context.input_pipeline_id * 2
        return tf.data.Dataset.range(100).batch(2).window(4).flat_map(lambda w: w.skip(begin).take(2))

    def step(row):
        context = tf.distribute.get_replica_context()
        replica = tf.cast(context.replica_id_in_sync_group, tf.float32)
        dense = context.all_reduce("SUM", tf.fill([100_000], replica))
        again = context.all_reduce("SUM", dense[:1] * (replica + 1))
        # 1, 2, 3 and 4 rows: of unequal lengths, which are padded on the way
        count = tf.cast(replica + 1, tf.int32)
        sparse = context.all_reduce("SUM", tf.IndexedSlices(tf.ones([count, 1]), tf.range(count), tf.constant([4, 1])))
        return row, dense[-1], again[0], tf.convert_to_tensor(sparse)[:, 0]

    iterator = iter(strategy.distribute_datasets_from_function(rows))
    call = tf.function(lambda: strategy.run(step, args=(next(iterator),)), autograph=False)
    steps = [
        [[part.numpy().tolist() for part in strategy.experimental_local_results(value)] for value in call()]
        for _ in range(3)
    ]
    said = {
        "replicas": strategy.num_replicas_in_sync,
        "devices": local_devices(strategy),
        "pipelines": [(context.num_input_pipelines, context.num_replicas_in_sync) for context in contexts],
        "steps": steps,
    }
    print(json.dumps(said))


def test_two_processes_with_two_replicas_each_are_four_replicas():
    results = harness.run_workers(["-c", "from tests.test_strategies import rehearse; rehearse()"], workers=2)
    for worker, (code, out, err) in enumerate(results):
        assert code == 0, out + err
        said = json.loads(out.splitlines()[-1])
        assert (said["replicas"], said["devices"], said["pipelines"]) == (4, ["CPU:0", "CPU:1"], [[2, 4]])
        for step, (row, dense, again, sparse) in enumerate(said["steps"]):
            first = step * 8 + worker * 4  # a global batch is 8 rows
            assert row == [[first, first + 1], [first + 2, first + 3]]
            assert dense == [6, 6]  # 0 + 1 + 2 + 3
            assert again == [60, 60]  # 6 * (1 + 2 + 3 + 4)
            assert sparse == [[4, 3, 2, 1]] * 2
