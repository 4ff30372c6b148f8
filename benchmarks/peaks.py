"""What a device computes at most, for MFU: dense peaks of matrix products, by its name and the precision."""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Hold the peak of one device and where it is from."""

    flops_per_second: float
    source: str


# Dense: the data sheets of Ampere and Hopper show twice as much, for matrices with zeros in a pattern. The names are
# those that TensorFlow reports; another variant of a device has another peak.
_TERAFLOPS = (
    (r"(NVIDIA |Tesla )?V100-SXM\d-\d+GB", {"float16": 125, "float32": 15.7}, "V100 data sheet"),
    (
        r"(NVIDIA )?A100(-SXM4|-PCIE)?[- ]\d+GB( PCIe)?",
        {"float16": 312, "bfloat16": 312, "tf32": 156, "float32": 19.5},
        "A100 data sheet",
    ),
    (r"NVIDIA H100 PCIe", {"float16": 756.5, "bfloat16": 756.5}, "H100 data sheet, PCIe"),
    (
        r"NVIDIA (H100 80GB HBM3|H200)",
        {"float16": 989.5, "bfloat16": 989.5, "tf32": 494.5, "float32": 67},
        "H100 and H200 data sheets, SXM",
    ),
    (r"TPU v5e", {"bfloat16": 197}, "cloud.google.com/tpu/docs/v5e"),
    (r"TPU v5p", {"bfloat16": 459}, "cloud.google.com/tpu/docs/v5p"),
)


def find(device_name: str, precision: str, *, tf32: bool = True) -> Peak | None:
    """Return the peak of one device at a precision of RunConfig, or None where it is not known.

    `device_name` is what `tf.config.experimental.get_device_details` calls `device_name`. `tf32` says whether matrix
    products of float32 may round what they multiply, as they do by default on devices that can.
    """
    for pattern, teraflops, source in _TERAFLOPS:
        if re.fullmatch(pattern, device_name):
            kind = precision.removeprefix("mixed_")
            if kind == "float32" and tf32 and "tf32" in teraflops:
                kind = "tf32"
            if kind in teraflops:
                return Peak(teraflops[kind] * 1e12, f"{source}: {teraflops[kind]} TFLOP/s, dense {kind}")
    return None
