import pytest
import tensorflow as tf

from distloop import runtime
from distloop.cluster import Cluster
from distloop.config import UsageError
from distloop.strategies import choose, local_devices, make_strategy

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
        ("multiworker", TWO, 2, "replicas is 2, but a multiworker process drives one CPU"),
        ("tpu", ALONE, None, "strategy is tpu, but there is no TPU here"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(name, cluster, replicas, sentence):
    with pytest.raises(UsageError) as refusal:
        make_strategy(choose(name, cluster=cluster, replicas=replicas), cluster=cluster, replicas=replicas)
    assert sentence in str(refusal.value)


def test_strategies_run_on_the_devices_they_say(mirrored):
    assert local_devices(tf.distribute.get_strategy()) == ["CPU:0"]
    assert local_devices(make_strategy("one_device", cluster=ALONE, replicas=None)) == ["CPU:0"]
    assert local_devices(mirrored) == ["CPU:0", "CPU:1"]


def test_devices_that_have_started_cannot_be_changed_and_that_is_said():
    tf.zeros([1])
    with pytest.raises(UsageError, match="TensorFlow has already started its devices in this process"):
        runtime.initialize(replicas=5, seed=0)
