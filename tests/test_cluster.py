import json
import os
import socket

import pytest

from distloop.cluster import Cluster, check_own_address, from_tf_config, is_this_machine, to_tf_config
from distloop.errors import PortTakenError, UsageError
from distloop.launcher.processes import free_ports
from tests import harness

TWO = ["a:1", "b:1"]
WORKER, EVALUATOR = {"type": "worker", "index": 0}, {"type": "evaluator", "index": 0}


def tf_config(cluster, task, **more):
    return json.dumps({"cluster": cluster, "task": task, **more})


def test_no_tf_config_is_one_process():
    assert from_tf_config(None) == from_tf_config("") == Cluster()
    assert (Cluster().num_workers, Cluster().is_chief, Cluster().is_evaluator) == (1, True, False)


def test_what_is_written_reads_back():
    cluster = Cluster(("a:1", "b:1"), 1)
    assert from_tf_config(to_tf_config(cluster)) == cluster
    assert (cluster.num_workers, cluster.is_chief) == (2, False)


def test_a_chief_job_is_worker_0_and_the_workers_follow():
    jobs = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    assert from_tf_config(tf_config(jobs, {"type": "chief", "index": 0})) == Cluster(("a:1", "b:1", "c:1"), 0)
    assert from_tf_config(tf_config(jobs, {"type": "worker", "index": 1})).index == 2


@pytest.mark.parametrize("jobs", [{"chief": ["a:1"], "worker": ["b:1"]}, {"worker": TWO, "evaluator": ["c:1"]}])
def test_an_evaluator_is_a_cluster_of_its_own(jobs):
    evaluator = from_tf_config(tf_config(jobs, EVALUATOR))
    assert (evaluator.is_evaluator, evaluator.num_workers, evaluator.addresses) == (True, 1, ())


def test_workers_do_not_train_with_the_evaluator():
    jobs = {"worker": TWO, "evaluator": ["c:1"]}
    assert from_tf_config(tf_config(jobs, WORKER)) == Cluster(("a:1", "b:1"), 0)


def test_what_operators_add_to_tf_config_is_ignored():
    text = tf_config({"worker": TWO}, {**WORKER, "cloud": "x"}, environment="cloud", job={})
    assert from_tf_config(text) == Cluster(("a:1", "b:1"), 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "TF_CONFIG is not JSON"),
        ("[]", "TF_CONFIG is []; expected a JSON object"),
        ('"worker"', "expected a JSON object"),
        ("{}", "has no 'cluster' of address lists"),
        (tf_config(None, WORKER), "has no 'cluster' of address lists"),
        (tf_config({"worker": "a:1"}, WORKER), "has no 'cluster' of address lists"),
        (tf_config({"worker": TWO, "ps": ["c:1"]}, WORKER), "names the job 'ps'"),
        (tf_config({"master": ["c:1"], "worker": TWO}, WORKER), "names the job 'master'"),
        (tf_config({"chief": TWO, "worker": ["c:1"]}, WORKER), "lists 2 chiefs; expected one"),
        (tf_config({"worker": ["a:1", "a:1"]}, WORKER), "lists an address twice"),
        (tf_config({"chief": ["a:1"], "worker": ["a:1"]}, WORKER), "lists an address twice"),
        (tf_config({"worker": TWO, "evaluator": ["b:1"]}, WORKER), "lists an address twice"),
        (tf_config({"worker": ["a:1", "b"]}, WORKER), "an address in TF_CONFIG is 'b'; expected host:port"),
        (tf_config({"worker": ["a:1", ":2"]}, WORKER), "is ':2'; expected host:port"),
        (tf_config({"worker": ["a:1", "b:x"]}, WORKER), "is 'b:x'; expected host:port"),
        (tf_config({"worker": ["a:1", "b:65536"]}, WORKER), "is 'b:65536'; expected host:port"),
        (tf_config({"worker": ["grpc://a:1"]}, WORKER), "is 'grpc://a:1'; expected host:port"),
        (tf_config({"worker": ["::1:5"]}, WORKER), "is '::1:5'; expected host:port, such as localhost:5050 or [::1]"),
        (tf_config({"worker": [5]}, WORKER), "is '5'; expected host:port"),
        (tf_config({"worker": [["a:1"]]}, WORKER), "expected host:port"),
        (tf_config({"worker": TWO}, {"type": "worker", "index": 2}), "task index 2, but 'cluster' has 2 process(es)"),
        (tf_config({"worker": TWO}, {"type": "worker", "index": -1}), "task index -1"),
        (tf_config({"worker": TWO}, {"type": "evaluator", "index": 1}), "has 1 process(es) of type 'evaluator'"),
        (tf_config({"worker": []}, WORKER), "has 0 process(es) of type 'worker'"),
        (tf_config({"worker": TWO}, {"type": "boss", "index": 0}), "expected a 'type' out of ['evaluator', 'worker']"),
        (tf_config({"worker": TWO}, {"type": ["worker"], "index": 0}), "has the task {'type': ['worker']"),
        (tf_config({"worker": TWO}, {"type": "worker", "index": "0"}), "and an 'index', a whole number"),
        (tf_config({"worker": TWO}, {"type": "worker"}), "has the task {'type': 'worker'}"),
        (tf_config({"worker": TWO}, None), "has the task None"),
    ],
)
def test_each_mistake_in_tf_config_names_its_field(text, sentence):
    with pytest.raises(UsageError) as refusal:
        from_tf_config(text)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        (socket.gethostname(), True),
        ("192.0.2.1", False),  # of TEST-NET-1, which no machine has
        ("[2001:db8::1]", False),
        ("no-such-host.invalid", None),
        ("x" * 64, None),  # too long for a label
    ],
)
def test_a_machine_knows_its_names_and_addresses(host, answer):
    assert is_this_machine(host) is answer


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "no-such-host.invalid"])
def test_an_own_address_with_a_free_port_passes_and_the_port_is_free_after(host):
    (port,) = free_ports(1)
    check_own_address(Cluster((f"{host}:{port}", "b:1"), 0))
    socket.create_server(("127.0.0.1", port)).close()


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"\(number 1\) the address 192.0.2.1:5, which this machine does not have"):
        check_own_address(Cluster(("localhost:1", "192.0.2.1:5"), 1))


@pytest.mark.parametrize("listening_at", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_that_is_taken_on_any_interface_is_told(listening_at):
    family = socket.AF_INET6 if ":" in listening_at else socket.AF_INET
    with socket.create_server((listening_at, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} of this host is taken by process {os.getpid()} "):
            check_own_address(Cluster((f"localhost:{port}", "b:1"), 0))


def test_a_process_that_trains_twice_has_its_port_already():
    (port,) = free_ports(1)
    check_own_address(Cluster((f"localhost:{port}", "b:1"), 0))
    with socket.create_server(("localhost", port)):  # as TensorFlow then does
        check_own_address(Cluster((f"localhost:{port}", "b:1"), 0))


def test_one_worker_needs_no_address():
    check_own_address(Cluster(("192.0.2.1:5",), 0))


def test_a_worker_says_before_tensorflow_starts_that_its_port_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        addresses = (f"127.0.0.1:{other.getsockname()[1]}", "b:1")
        code, _, err = harness.run(
            *("-m", "distloop", "--task=mnist_cnn", f"--workdir={tmp_path}"),
            TF_CONFIG=to_tf_config(Cluster(addresses, 0)),
            limit_secs=60,
        )
    assert (code, f"is taken by process {os.getpid()} " in err) == (PortTakenError.exit_code, True)
    (file,) = (tmp_path / "errors").iterdir()
    record = json.loads(file.read_text())
    assert (record["type"], record["collateral"]) == ("PortTakenError", False)
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]
