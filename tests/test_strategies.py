import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from distloop import State, Task, mean, minimize, runtime
from distloop.cluster import Cluster, from_tf_config
from distloop.config import UsageError
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
            "there is no TF_CONFIG with several workers; start it with python -m launch.local",
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


def many_collectives(config):
    """Make a task whose step has a dense and sparse gradients and a BatchNormalization that reduces both ways."""
    generator = np.random.default_rng(0)
    data = {
        "word": generator.integers(0, 50, size=[42, 5]),
        "y": generator.normal(size=42).astype(np.float32),
    }

    def build():
        layers = [keras.layers.Embedding(50, 8), keras.layers.Flatten(), keras.layers.Dense(8)]
        layers += [keras.layers.BatchNormalization(synchronized=True), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([5], dtype="int64"), *layers], name="net")
        return State(model=model, optimizer=keras.optimizers.SGD(config.learning_rate, momentum=0.9))

    def train_step(state, batch):
        def loss(batch):
            return tf.square(state.model(batch["word"], training=True)[:, 0] - batch["y"])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def eval_step(state, batch):
        return {"loss": mean(tf.square(state.model(batch["word"])[:, 0] - batch["y"]), batch["weight"])}

    return Task(build, train_step, lambda: data, eval_step, lambda: data)


def test_two_processes_with_two_replicas_each_train_to_what_one_device_does(tmp_path):
    held = {}
    for strategy, replicas, workers in (("default", None, 1), ("multiworker", 2, 2)):
        config = dict(task="tests.test_strategies:many_collectives", strategy=strategy, replicas=replicas)
        config |= dict(train_steps=30, steps_per_call=10, global_batch_size=8, workdir=str(tmp_path / strategy))
        arguments = ["-m", "tests.dump_replicas", str(tmp_path / f"{strategy}.out"), json.dumps(config)]
        for code, out, err in harness.run_workers(arguments, workers=2) if workers > 1 else [harness.run(*arguments)]:
            assert code == 0, out + err
        for worker in range(workers):
            for name, value in np.load(tmp_path / f"{strategy}.out.worker{worker}.npz").items():
                replica, _, name = name.partition(":")
                held.setdefault(name, {})[strategy, worker, int(replica)] = value
    assert held
    for name, values in held.items():
        one_device = values.pop(("default", 0, 0))
        assert sorted(values) == [("multiworker", worker, replica) for worker in range(2) for replica in range(2)]
        for value in values.values():
            np.testing.assert_array_equal(value, values["multiworker", 0, 0], err_msg=name)
            np.testing.assert_allclose(value, one_device, rtol=1e-5, atol=1e-6, err_msg=name)
