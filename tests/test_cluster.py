import json

import pytest

from distloop.cluster import Cluster, from_tf_config, to_tf_config
from distloop.config import UsageError

TWO = ["a:1", "b:1"]


def tf_config(cluster, task):
    return json.dumps({"cluster": cluster, "task": task})


def test_no_tf_config_is_one_process():
    assert from_tf_config(None) == from_tf_config("") == Cluster()
    assert (Cluster().num_workers, Cluster().is_chief) == (1, True)


def test_what_is_written_reads_back():
    cluster = Cluster(("a:1", "b:1"), 1)
    assert from_tf_config(to_tf_config(cluster)) == cluster
    assert (cluster.num_workers, cluster.is_chief) == (2, False)


def test_a_chief_job_is_worker_0_and_the_workers_follow():
    jobs = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    assert from_tf_config(tf_config(jobs, {"type": "chief", "index": 0})) == Cluster(("a:1", "b:1", "c:1"), 0)
    assert from_tf_config(tf_config(jobs, {"type": "worker", "index": 1})).index == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "TF_CONFIG is not JSON"),
        ("[]", "has no 'cluster' of address lists"),
        ('{"cluster": {"worker": "a:1"}}', "has no 'cluster' of address lists"),
        (tf_config({"worker": TWO, "ps": ["c:1"]}, {"type": "worker", "index": 0}), "names the job 'ps'"),
        (tf_config({"worker": ["a:1", "a:1"]}, {"type": "worker", "index": 0}), "lists an address twice"),
        (tf_config({"worker": TWO}, {"type": "worker", "index": 2}), "task index 2, but 'cluster' lists 2 worker(s)"),
        (tf_config({"worker": TWO}, {"type": "worker", "index": -1}), "task index -1"),
        (tf_config({"worker": TWO}, {"type": "boss", "index": 0}), "expected a 'type' out of ['worker']"),
        (tf_config({"worker": TWO}, None), "has the task None"),
    ],
)
def test_each_mistake_in_tf_config_names_its_field(text, sentence):
    with pytest.raises(UsageError) as refusal:
        from_tf_config(text)
    assert sentence in str(refusal.value)
