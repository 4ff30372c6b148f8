"""What a user would pick instead of distloop, on the same task: the peers, and whether they have done the same.

    with peers.started("fit_many", setup, dataset) as call:
        losses = [call(1) for _ in range(10)]

Imports no TensorFlow until a peer is started. docs/benchmarks/peers.md says what each peer is.
"""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.timing import Train
from distloop.errors import UsageError

# Relative. In float32, sums in another order differ by 1e-7, and ten steps make up to 1e-5 of it; with 16 bits
# one rounding is 4e-3 (bfloat16) or 5e-4 (float16) of an activation, and its mean over a batch much less.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 1e-2, "mixed_float16": 1e-2}

# What TensorFlow's message of an error in a graph has before what was wrong.
_FRAMES = re.compile(r'Graph execution error|Detected at node|File "|\d+ root error')
_CODE = re.compile(r"^(\(\d+\) )?[A-Z_]+: +")


def started(peer: str, setup: Any, dataset: Any) -> AbstractContextManager[Train]:
    """Get a peer (a name of `cases.PEERS` but distloop) ready to train `setup.task`; its call is valid within.

    `setup` is a `startup.Setup` whose state has not been trained, its seeds separated; `dataset`, the distributed,
    endless dataset of its batches. Raises UsageError if the peer is not installed, or if the settings ask for what
    only distloop does.
    """
    check_installed(peer)
    from benchmarks import peer_fit, peer_loops, peer_orbit, peer_step

    peer_step.check(setup, dataset)
    start = {
        "loop": peer_loops.one_step_a_call,
        "loop_in_graph": peer_loops.many_steps_a_call,
        "fit": peer_fit.one_step_an_execution,
        "fit_many": peer_fit.many_steps_an_execution,
        "orbit": peer_orbit.controller,
    }
    return start[peer](setup, dataset)


def check_installed(peer: str) -> None:
    """Raise UsageError if a package that `peer` needs is not installed."""
    if peer != "orbit":
        return
    found = importlib.util.find_spec("orbit")
    folders = (found and found.submodule_search_locations) or []
    # Another project, of time series, is an `orbit`, too.
    is_ours = any((Path(folder) / "standard_runner.py").is_file() for folder in folders)
    if not is_ours or importlib.util.find_spec("tf_keras") is None:
        raise UsageError(
            "the peer orbit is not installed; pip install --no-deps 'tf-models-official==2.20.*' 'tf-keras==2.21.*' "
            "(with their dependencies, most of which Orbit does not use, it would replace this TensorFlow)."
        )


def differences(losses: Mapping[str, Sequence[float]], precision: str) -> list[str]:
    """Return a sentence for each peer whose losses after the same steps are not those of the first: do not compare it.

    `losses` has the losses of the first steps by peer, of equal weights and batches.
    """
    (reference, expected), *others = losses.items()
    tolerance, found = TOLERANCE[precision], []
    for peer, values in others:
        if len(values) != len(expected):
            found.append(f"{peer} has the losses of {len(values)} steps and {reference} of {len(expected)}.")
            continue
        for step, (value, wanted) in enumerate(zip(values, expected, strict=True), 1):
            skipped = precision == "mixed_float16" and math.isnan(wanted)  # by the loss scale: counts nowhere
            if not skipped and not math.isclose(value, wanted, rel_tol=tolerance):
                found.append(
                    f"{peer} has the loss {value:.8g} after step {step} where {reference} has {wanted:.8g}, which "
                    f"differs by more than {tolerance:g}: they do not train alike, and their speeds cannot be compared."
                )
                break
    return found


def reason(error: BaseException) -> str:
    """Return in one line why a peer has failed; TensorFlow tells it below pages of frames."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line and not _FRAMES.match(line)), "")
    return f"{type(error).__name__}: {_CODE.sub('', line)}"
