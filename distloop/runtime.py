"""The state of this process: devices, seeds, precision. Only this module changes it, before the first operation."""

import os

import keras
import tensorflow as tf

from distloop.errors import UsageError


def initialize(*, replicas: int | None, seed: int, precision: str, deterministic: bool = False) -> None:
    """Set up `replicas` devices (GPUs, or logical CPU devices where there is none), seeds and Keras's dtype policy.

    `deterministic` cannot be taken back in this process. Must run before TensorFlow starts its devices. Raises
    UsageError if there are fewer devices than asked for.
    """
    if deterministic:
        tf.config.experimental.enable_op_determinism()
        # NCCL otherwise picks its algorithm by measuring, and with it the order in which it sums.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    gpus = tf.config.list_physical_devices("GPU")
    if replicas is not None and gpus and replicas > len(gpus):
        raise UsageError(f"replicas is {replicas}, but this machine has {len(gpus)} GPU(s); ask for at most that many.")
    try:
        for gpu in gpus:
            # Take memory as needed, so that several processes can share a machine.
            tf.config.experimental.set_memory_growth(gpu, True)
        if replicas is not None and not gpus:
            _make_logical_cpus(replicas)
    except RuntimeError as error:
        raise UsageError(
            f"TensorFlow has already started its devices in this process ({error}); "
            "call distloop before any TensorFlow operation."
        ) from error
    # Layer names count from 1 again and initial weights repeat, also for a second run in one process.
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(precision)


def _make_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu) or [None]
    if len(present) < count:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        if count >= (os.cpu_count() or 1) > 1:
            # The replicas keep all cores busy; a kernel that shares itself out would wait for threads that others hold.
            tf.config.threading.set_intra_op_parallelism_threads(1)
