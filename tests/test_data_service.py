"""A tf.data service in processes of its own feeds training processes; killing one of its workers loses nothing."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from distloop.data import make_stream, per_replica_batches
from tests import harness

N, BATCH, EPOCHS = 1000, 16, 3  # as tests.own_task:counts_examples has them
STEPS = 63  # an epoch


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def service():
    """Start a dispatcher and two workers; yield the process and their address."""
    process = harness.start(["-m", "launch.data_service", "--workers=2"])
    ready = "tf.data service with 2 workers: train with --data_service="
    harness.until(lambda: ready in process.output()[0], process, limit_secs=120)
    yield process, process.output()[0].partition(ready)[2].split()[0]
    if process.poll() is None:
        harness.kill(process)


@pytest.mark.slow
def test_killing_a_service_worker_loses_no_example_of_two_training_processes(service, tmp_path):
    serving, address = service
    metrics = tmp_path / "run" / "metrics.jsonl"
    flags = ["--task=tests.own_task:counts_examples", f"--global_batch_size={BATCH}", f"--epochs={EPOCHS}"]
    flags += ["--steps_per_call=1", f"--data_service={address}", f"--workdir={metrics.parent}"]
    training = harness.start(harness.supervised("-m", "distloop", *flags, workers=2))
    try:
        harness.until(lambda: len(lines(metrics)) > STEPS // 4, training, limit_secs=120)
        _, worker, _ = children(serving.pid)
        os.kill(worker, signal.SIGKILL)
        killed_at = len(lines(metrics))
    finally:
        code, out, err = harness.finish(training)
    assert code == 0, err
    assert f"data service      {address} promises no order" in out

    rows = [json.loads(line) for line in lines(metrics)]
    steps = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, EPOCHS * STEPS + 1))
    assert killed_at < len(rows) - 2 * STEPS
    # Each step had the examples that one process has without the service, and so each epoch had each example once.
    source = {"id": np.arange(N)}
    stream = make_stream(source, name="train_data", global_batch_size=BATCH, seed=0)
    batches = per_replica_batches(stream, tf.distribute.InputContext(1, 0, 1), first_step=0)
    epoch = []
    for row, batch in zip(steps, batches.as_numpy_iterator(), strict=False):
        ids = batch["id"][batch["weight"] > 0]
        assert row["number"] == ids.mean()
        assert row["square"] == (ids**2).mean()
        epoch.extend(ids)
        if row["step"] % STEPS == 0:
            assert sorted(epoch) == list(range(N))
            epoch = []

    processes = children(serving.pid)
    assert len(processes) == 3
    os.kill(serving.pid, signal.SIGTERM)
    code, _, err = harness.finish(serving)
    assert code == 128 + signal.SIGTERM
    assert "worker 0 was killed by SIGKILL; it is started again." in err
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
