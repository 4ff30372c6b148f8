"""The tf.data service in this process: the batches, their order and a resume are those without it."""

import socket
import time
from itertools import islice

import numpy as np
import pytest
import tensorflow as tf

from distloop import service
from distloop.config import RunConfig
from distloop.data import make_stream, per_replica_batches
from distloop.errors import UsageError
from distloop.launcher import data_service
from distloop.pipeline import Pipeline
from distloop.records import load_tfrecords

N, BATCH, STEPS = 21, 8, 3  # 8 + 8 + 5
SERVICE = tf.data.experimental.service


def start_dispatcher():
    dispatcher = SERVICE.DispatchServer(SERVICE.DispatcherConfig(worker_timeout_ms=1000))
    return dispatcher, dispatcher.target.removeprefix("grpc://")


def start_worker(address):
    return SERVICE.WorkerServer(SERVICE.WorkerConfig(address, heartbeat_interval_ms=100))


@pytest.fixture(scope="module")
def address():
    dispatcher, address = start_dispatcher()
    workers = [start_worker(address) for _ in range(2)]
    yield address
    del workers, dispatcher


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(service, "PATIENCE_SECS", 0.5)
    monkeypatch.setattr(service, "RETRY_SECS", 1)


def arrays(_):
    return {"id": np.arange(N), "double": 2 * np.arange(N)}


def records(folder):
    with tf.io.TFRecordWriter(str(folder / "one.tfrecord")) as writer:
        for number in range(N):
            writer.write(np.int64(number).tobytes())
    return Pipeline(
        load_tfrecords(folder / "one.tfrecord"),
        map=lambda record: {"id": tf.io.decode_raw(record, tf.int64)[0]},
        augment=lambda example, seed: {**example, "noise": tf.random.stateless_uniform([2], seed)},
    )


def stream_of(source):
    return make_stream(source, name="train_data", global_batch_size=BATCH, seed=7)


def take(dataset, count):
    return list(islice(dataset.as_numpy_iterator(), count))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("source", [arrays, records])
@pytest.mark.parametrize(("workers", "replicas"), [(1, 1), (2, 4)])
def test_every_example_comes_once_an_epoch_in_the_order_of_a_run_without_the_service(
    address, tmp_path, source, workers, replicas
):
    stream, count = stream_of(source(tmp_path)), 3 * STEPS * replicas // workers
    seen = [[] for _ in range(3)]
    for worker in range(workers):
        context = tf.distribute.InputContext(workers, worker, replicas)
        batches = service.batches_from_service(stream, context, first_step=0, address=address)
        without = per_replica_batches(stream, context, first_step=0)
        assert (batches.element_spec, batches.cardinality()) == (without.element_spec, without.cardinality())
        found = take(batches, count)
        assert_equal(found, take(without, count))
        for number, batch in enumerate(found):
            seen[number * 3 // count].extend(batch["id"][batch["weight"] > 0])
    assert [sorted(epoch) for epoch in seen] == [list(range(N))] * 3
    assert seen[0] != seen[1]


@pytest.mark.parametrize("first_step", [2, 4])
def test_a_resumed_run_goes_on_where_it_stopped_and_not_where_the_service_is(address, first_step):
    stream, context = stream_of(arrays(None)), tf.distribute.InputContext(1, 0, 2)
    for _ in range(2):  # the second one must not go on where the first one left the service
        batches = service.batches_from_service(stream, context, first_step=first_step, address=address)
        assert_equal(take(batches, 6), take(per_replica_batches(stream, context, first_step=first_step), 6))


def test_a_service_that_falls_silent_costs_no_batch_and_is_used_again_when_it_is_back(capfd, short_patience):
    _dispatcher, address = start_dispatcher()
    worker = start_worker(address)
    stream, context = stream_of(arrays(None)), tf.distribute.InputContext(2, 1, 2)
    batches = iter(service.batches_from_service(stream, context, first_step=1, address=address))
    without = per_replica_batches(stream, context, first_step=1).as_numpy_iterator()

    def assert_goes_on(steps=40):
        found = [{name: value.numpy() for name, value in next(batches).items()} for _ in range(steps)]
        assert_equal(found, list(islice(without, steps)))

    assert_goes_on()
    worker._stop()
    assert_goes_on(100)  # more than was on its way
    assert "is silent (nothing came for 0.5 s)" in capfd.readouterr().err
    worker = start_worker(address)
    said, limit = "", time.monotonic() + 60
    while "is back" not in said and time.monotonic() < limit:
        assert_goes_on(1)
        time.sleep(0.005)  # what a step takes; the service is never back for those who are faster without it
        said += capfd.readouterr().err
    assert "is back" in said


def test_a_batch_that_does_not_come_is_made_here(address, monkeypatch):
    monkeypatch.setattr(service, "WINDOW", 4)
    stream, context = stream_of(arrays(None)), tf.distribute.InputContext(1, 0, 1)
    feed = service._Feed(lambda number: lossy(stream, context, number), address, 0)
    without = per_replica_batches(stream, context, first_step=0).as_numpy_iterator()
    found = [{name: value.numpy() for name, value in feed.take(number).items()} for number in range(12)]
    assert_equal(found, list(islice(without, 12)))


def lossy(stream, context, number):
    numbered = service.batches_by_number(stream, context)(tf.data.Dataset.range(number, 10_000))
    # Every second one is lost on its way; of what is made here, `number` is the first.
    return numbered.filter(lambda n, _: (n == number) | (n % 2 == 0))


def stateful(_):
    counter = tf.Variable(0, dtype=tf.int64)
    return Pipeline(arrays(None), map=lambda example: {**example, "count": counter.assign_add(1)})


def gone(folder):
    pipeline = records(folder)
    (folder / "one.tfrecord").unlink()
    return pipeline


@pytest.mark.parametrize(
    ("source", "sentence"), [(stateful, "cannot make the batches"), (gone, "one.tfrecord; No such file or directory")]
)
def test_what_the_service_cannot_make_is_refused_before_the_first_step(address, tmp_path, source, sentence):
    stream, context = stream_of(source(tmp_path)), tf.distribute.InputContext(1, 0, 1)
    with pytest.raises(UsageError, match="the same TensorFlow and the data under the same paths") as refusal:
        service.batches_from_service(stream, context, first_step=0, address=address)
    assert sentence in str(refusal.value)


def test_a_source_that_is_not_read_by_index_is_refused(address, tmp_path):
    for source, sentence in [
        (tf.data.Dataset.from_tensor_slices(arrays(None)), "is a tf.data.Dataset, which is read from front to back"),
        ({"id": np.lib.format.open_memmap(tmp_path / "id.npy", "w+", np.int64, (3,))}, "on this machine's disk"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            service.check_service(address, stream_of(source))


def test_a_service_that_is_not_there_or_has_no_worker_is_refused():
    stream = stream_of(arrays(None))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    with pytest.raises(UsageError, match=f"data_service is 127.0.0.1:{port}, but no dispatcher"):
        service.check_service(f"127.0.0.1:{port}", stream)
    _dispatcher, address = start_dispatcher()
    with pytest.raises(UsageError, match="has no worker"):
        service.check_service(address, stream)


@pytest.mark.parametrize("address", ["localhost", "5050", ":5050", "grpc://localhost:5050", "host:0", "host:port"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(UsageError, match=r"data_service is .*; expected host:port"):
        RunConfig(data_service=address)


def test_a_service_that_cannot_start_is_refused():
    given = {"workers": 1, "port": 0, "host": "localhost", "dispatcher": None}
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port is {port}, which cannot be had"):
            data_service.run(**given | {"port": port})
    for wrong, sentence in [
        ({"workers": 0}, "workers is 0"),
        ({"port": 70_000}, "port is 70000"),
        ({"dispatcher": "localhost"}, "dispatcher is 'localhost'; expected host:port"),
        ({"dispatcher": f"localhost:{port}"}, f"dispatcher is localhost:{port}, where no one listens"),
    ]:
        with pytest.raises(UsageError, match=sentence):
            data_service.run(**given | wrong)
