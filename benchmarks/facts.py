"""What a launch says of its model and its devices."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from benchmarks import bare_steps
from benchmarks.cases import Case
from benchmarks.leave_out import Reduced
from benchmarks.workloads import unit_of
from distloop.data import Stream
from distloop.startup import Setup


def of_model(case: Case, setup: Setup, stream: Stream, reduced: Sequence[Reduced]) -> dict[str, Any]:
    """Return what a launch says of its model and its devices; `reduced` is what its steps exchange, if they do."""
    variables = bare_steps.trainable_variables(setup.state)
    unit, units_per_example = unit_of(case.workload, stream.features)
    first = reduced[-1] if reduced else Reduced(0, 0, ())
    return {
        "global_batch": case.global_batch,
        "params": sum(variable.shape.num_elements() for variable in map(tf.convert_to_tensor, variables)),
        "gradient_bytes": {"dense": first.dense_bytes, "sparse": first.sparse_bytes},
        "gradient_tensors": len(first.rows),
        "unit": unit,
        "units_per_example": units_per_example,
        "flops_per_example": None,
        "memory": {"device_peak_bytes": device_peak_bytes()},
        "devices": device_names(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "hosts": len({address.rpartition(":")[0] for address in setup.workers.addresses}) or 1,
    }


def device_peak_bytes() -> int | None:
    """Return the most memory that a GPU of this process has had in use, if it has one."""
    gpus = tf.config.list_logical_devices("GPU")
    peaks = [tf.config.experimental.get_memory_info(gpu.name.partition("device:")[2])["peak"] for gpu in gpus]
    return max(peaks, default=None)


def device_names() -> list[str]:
    """Name the accelerators of this process, such as `NVIDIA H200`; none without one."""
    gpus = tf.config.list_physical_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
