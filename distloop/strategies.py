"""The five `tf.distribute` strategies behind one function, and `auto`, which picks from what is there."""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

from distloop.cluster import Cluster
from distloop.errors import UsageError

_LANES = 4  # collectives of a device that are under way at once


def choose(name: str, *, cluster: Cluster, replicas: int | None) -> str:
    """Return the strategy that `name` (a value of `config.STRATEGIES`) means here; `auto` becomes one of the others.

    Raises UsageError if the strategy does not fit the cluster or the number of replicas.
    """
    if name == "auto":
        if cluster.num_workers > 1:
            return "multiworker"
        if _tpu_is_here():
            return "tpu"
        return "mirrored" if len(_devices(replicas)) > 1 else "default"
    if cluster.num_workers > 1 and name != "multiworker":
        raise UsageError(
            f"strategy is {name}, but TF_CONFIG lists {cluster.num_workers} workers; "
            "use --strategy=multiworker (or auto), or unset TF_CONFIG."
        )
    if name in ("default", "one_device") and replicas not in (None, 1):
        raise UsageError(f"strategy {name} has one replica, not {replicas}; use --strategy=mirrored.")
    return name


@functools.cache
def make_strategy(name: str, *, cluster: Cluster, replicas: int | None) -> tf.distribute.Strategy:
    """Make the strategy `name`, as `choose` returned it, over this process's first `replicas` devices.

    A process makes each strategy once and gets it again: two over the same devices share collective keys and collide
    (tensorflow#61314). Under `multiworker` this waits until every worker has started. Raises UsageError if there is no
    such hardware.
    """
    make = {
        "default": lambda: tf.distribute.get_strategy(),
        "one_device": lambda: tf.distribute.OneDeviceStrategy(_devices(1)[0]),
        "mirrored": lambda: tf.distribute.MirroredStrategy(_devices(replicas)),
        "multiworker": lambda: _multiworker(cluster, replicas),
        "tpu": _tpu,
    }
    return make[name]()


def local_devices(strategy: tf.distribute.Strategy) -> list[str]:
    """Name the devices that this process drives, such as `CPU:0`."""
    is_default = strategy is tf.distribute.get_strategy()  # which does not list its device
    names = _devices(1) if is_default else strategy.extended.worker_devices
    return [name.partition("device:")[2] for name in names]


def _devices(count: int | None) -> list[str]:
    """Name the first `count` GPUs (all if None), or the first `count` logical CPUs (one if None) without a GPU."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        return [gpu.name for gpu in gpus[:count]]
    return [cpu.name for cpu in tf.config.list_logical_devices("CPU")[: count or 1]]


def _multiworker(cluster: Cluster, replicas: int | None) -> tf.distribute.Strategy:
    if cluster.num_workers == 1:
        raise UsageError(
            "strategy is multiworker, but there is no TF_CONFIG with several workers; "
            "start it with python -m launch.run --workers=2 -- ..., or use --strategy=mirrored."
        )
    gpus = len(tf.config.list_physical_devices("GPU"))
    if gpus and replicas not in (None, gpus):
        # MultiWorkerMirroredStrategy takes all GPUs of a process and offers no choice.
        raise UsageError(
            f"replicas is {replicas}, but a multiworker process drives its {gpus} GPU(s); "
            "drop --replicas and start more workers."
        )
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if gpus else implementation.RING
    )
    if gpus:
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    # A thread that computes serves no other worker, and with one thread nothing leaves before the backward pass ends.
    tf.config.threading.set_inter_op_parallelism_threads(max(2, len(os.sched_getaffinity(0))))
    with _taking_cpus(replicas or 1):
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    _open_lanes(strategy)
    return strategy


@contextlib.contextmanager
def _taking_cpus(count: int) -> Iterator[None]:
    """Let a MultiWorkerMirroredStrategy that is made here take `count` logical CPUs of its process, not just one.

    This rehearses hosts with several GPUs: all else in the strategy counts its devices. The method is private; a test
    with two processes of two replicas pins it, and `setup.cfg` bounds the TensorFlow version.
    """
    extended: Any = CollectiveAllReduceExtended
    original = extended._initialize_local_devices

    def first_cpus(_: object, __: object, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{index}" for index in range(count)), "CPU"

    extended._initialize_local_devices = first_cpus
    try:
        yield
    finally:
        extended._initialize_local_devices = original


def _open_lanes(strategy: tf.distribute.Strategy) -> None:
    """Let some collectives of a device be under way at once, so that one sends while another adds up.

    TensorFlow runs those with one ordering token one after the other, as NCCL needs it; CPUs tell them apart by their
    keys. Each collective that is traced takes the next of a few tokens. The launchers are private; a test pins them.
    """
    for launcher in strategy.extended._cross_device_ops._launchers:
        with tf.device(launcher._device):
            launcher._lanes = [tf.Variable(tf.constant(0.0), trainable=False) for _ in range(_LANES)]
        tokens = itertools.cycle([lane.handle for lane in launcher._lanes])
        launcher._get_ordering_token = functools.partial(next, tokens)


def _tpu_is_here() -> bool:
    # A TPU VM shows its chips as files; a remote TPU is named by this variable.
    return "TPU_NAME" in os.environ or Path("/dev/accel0").exists()


def _tpu() -> tf.distribute.Strategy:
    """Connect to the TPU along the path documented at https://www.tensorflow.org/guide/tpu. Not run on TPU hardware."""
    # Newer TPU VMs show /dev/vfio instead; so do other machines, hence not a reason for `auto`.
    if not (_tpu_is_here() or Path("/dev/vfio").exists()):
        raise UsageError(
            "strategy is tpu, but there is no TPU here (no /dev/accel0, no /dev/vfio and no TPU_NAME); "
            "start on a TPU VM, or use --strategy=auto."
        )
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=os.environ.get("TPU_NAME", "local"))
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
