"""What a measurement ran on: versions, hardware and the variables that change how TensorFlow runs. Never a secret."""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import runpy
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import distloop
from distloop.launcher import machine

_ROOT = Path(distloop.__file__).parents[1]
_PACKAGES = {"tensorflow": "tensorflow", "keras": "keras", "numpy": "numpy", "nccl": "nvidia-nccl-cu12"}
_PREFIXES = ("TF_", "NCCL_", "OMP_", "XLA_", "TPU_", "CUDA_VISIBLE_DEVICES")
# What differs from launch to launch, what changes only the log or is set by TensorFlow's import, and Terraform's.
_LEFT_OUT = ("TF_CONFIG", "TF_CPP_", "NCCL_DEBUG", "TPU_ML_PLATFORM", "TF_CLI_", "TF_VAR_")
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
_SMI_SECS = 20.0
_BUSY_GPU = 0.05  # of its memory; the driver itself takes less
_BUSY_CPU = 0.2  # of the cores


def collect() -> dict[str, Any]:
    """Return the fields of an env line. TensorFlow is not loaded for it."""
    gpus = _gpus()
    usable, limit = machine.cores()
    total, _, memory_limit = machine.memory()
    facts = {
        "versions": _versions(),
        "hardware": {
            "device": gpus[0].name if gpus else _cpu(),
            "devices": len(gpus) or 1,
            "device_memory_bytes": gpus[0].memory * 2**20 if gpus else None,
            "cpu": _cpu(),
            "cores": int(min(usable, limit or usable)) or 1,
            # In whole GiB: what the kernel keeps for itself differs from version to version.
            "memory_bytes": round(min(total, memory_limit or total) / 2**30) * 2**30,
            "driver": gpus[0].driver if gpus else None,
        },
        "environment": relevant(os.environ),
    }
    return {"hash": _hash(facts), **facts}


def relevant(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change how fast TensorFlow runs: those of known prefixes, but no secrets."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(_PREFIXES)
        and not name.startswith(_LEFT_OUT)
        and not any(word in name.upper() for word in _SECRET)
    }


def differences(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `fact: this and that` for what makes the hashes of two env lines differ."""
    return [
        f"{name}: {old.get(name)} and {now.get(name)}"
        for part in ("versions", "hardware", "environment")
        for old, now in [(_compared(base)[part], _compared(new)[part])]
        for name in sorted(old.keys() | now.keys())
        if old.get(name) != now.get(name)
    ]


def warnings() -> list[str]:
    """Say what disturbs measurements at this moment: the clock of the cores, and other processes."""
    found = []
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    with contextlib.suppress(OSError):
        if (name := governor.read_text().strip()) != "performance":
            found.append(f"the CPU governor is {name}, under which the clock changes; performance keeps it")
    load, cores = os.getloadavg()[0], machine.cores()[0]
    if load > _BUSY_CPU * cores:
        found.append(f"the load average is {load:.1f} on {cores} cores before anything was started")
    busy = [gpu.number for gpu in _gpus() if gpu.used > _BUSY_GPU * gpu.memory]
    if busy:
        found.append(f"other processes use memory of GPU {', '.join(busy)}")
    return found


def commit() -> dict[str, Any]:
    """Return the commit of distloop's sources and whether they were changed since; None for an installed package."""
    if _git("ls-files", "--error-unmatch", "distloop/__init__.py") is None:
        return {"commit": None, "dirty": None}  # the repository around it, if any, is another's
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _versions() -> dict[str, str | None]:
    # What tf.sysconfig.get_build_info returns, from its file: an imported TensorFlow stays in memory for all launches.
    module: Any = importlib.util.find_spec("tensorflow")
    build = runpy.run_path(str(Path(module.origin).with_name("python") / "platform/build_info.py"))["build_info"]
    return {
        "python": platform.python_version(),
        "distloop": distloop.__version__,
        **{name: _version(package) for name, package in _PACKAGES.items()},
        **{name: build.get(f"{name}_version") for name in ("cuda", "cudnn")},
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu() -> str:
    """Return the model of the first core, or its architecture where the kernel tells no model."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())


def _gpus() -> Sequence[machine.Gpu]:
    with contextlib.suppress(FileNotFoundError):
        return machine.parse_gpus(machine.ask(machine.QUERY_GPUS, os.environ, limit_secs=_SMI_SECS)[1])
    return []


def _compared(env: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what two runs must have in common: all but the version of distloop, of which two may be compared."""
    versions = {name: version for name, version in env["versions"].items() if name != "distloop"}
    return {"versions": versions, "hardware": env["hardware"], "environment": env["environment"]}


def _hash(env: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_compared(env), sort_keys=True).encode()).hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    """Return what git says of the sources, or None where it is not there or has no answer."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
