"""What a run leaves in its folder, and in what two runs differ."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from distloop.metrics import TIMES
from tests.test_writers import events, lines

INDEX = "checkpoint.json"  # the file that a complete checkpoint has
TIMING = (*TIMES, "seconds")  # what no two runs have in common


def checkpoints(folder: Path) -> list[Path]:
    """Return all folders of checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*"))


def complete(path: Path) -> bool:
    """Return whether a folder is a whole checkpoint."""
    return path.suffix == "" and (path / INDEX).exists()


def saved_steps(folder: Path) -> list[int]:
    """Return 0 and the steps of the complete checkpoints."""
    return [0, *(int(path.name.removeprefix("step_")) for path in checkpoints(folder) if complete(path))]


def last_logged(folder: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl, 0 if there is none."""
    path = folder / "metrics.jsonl"
    whole, _, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def state(folder: Path) -> dict[str, np.ndarray]:
    """Return every variable of the newest checkpoint, by name."""
    (index,) = checkpoints(folder)[-1].glob("*.index")
    reader = tf.train.load_checkpoint(str(index.with_suffix("")))
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


def digest(folder: Path) -> str:
    """Return the SHA-256 over the names, types, shapes and bytes of all variables of the newest checkpoint."""
    sha = hashlib.sha256()
    for name, value in state(folder).items():
        sha.update(f"{name} {value.dtype} {value.shape};".encode() + value.tobytes())
    return sha.hexdigest()


def differences(folder: Path, clean: Path) -> list[str]:
    """Return in what the finished run in `folder` is not that in `clean`, with the first entries that differ."""
    ours, theirs = _left(folder), _left(clean)
    found = []
    for what, expected in theirs.items():
        if isinstance(expected, list) and ours[what] != expected:
            only_ours = [entry for entry in ours[what] if entry not in expected]
            found.append(f"{what}: {only_ours[:3]} there, {[e for e in expected if e not in ours[what]][:3]} not there")
        elif ours[what] != expected or ours[what] is False:
            found.append(f"{what}: {ours[what]}, not {expected}")
    return found


def _left(folder: Path) -> dict[str, Any]:
    """Return what a finished run leaves, and what must be true of it."""
    rows = [(line["step"], line["split"], without_timing(line)) for line in lines(folder)]
    once = sorted({(step, split != "train") for step, split, _ in rows})  # an evaluation comes after its step
    written = [
        (step, split, name, repr(np.float32(np.nan if value is None else value)))
        for step, split, row in rows
        for name, value in row.items()
        if name not in ("step", "split")
    ]
    in_events = [
        (step, split, name, repr(np.float32(value)))
        for split in ("train", "eval")
        for step, name, value in events(folder / split)  # which asserts that there is one file
        if name not in TIMING
    ]
    files = [re.sub(r"tfevents\..*", "tfevents", str(path.relative_to(folder))) for path in sorted(folder.rglob("*"))]
    # What a worker recorded that outlived another by a moment stays, for a person to read.
    files = [path for path in files if not re.fullmatch(r"errors(/.*\.json)?|logs(/.*)?", path)]
    return {
        "SHA-256 of all variables": digest(folder),
        "metrics.jsonl": rows,
        "each step is in metrics.jsonl once, in order": [(step, split != "train") for step, split, _ in rows] == once,
        "the event files hold what metrics.jsonl holds": sorted(in_events) == sorted(written),
        "files": files,
        "summary.json": without_timing(json.loads((folder / "summary.json").read_text())),
        "host state": without_timing(json.loads((checkpoints(folder)[-1] / INDEX).read_text())["host_state"]),
    }


def without_timing(value: object) -> object:
    """Return a JSON value without the entries that no two runs have in common."""
    if isinstance(value, dict):
        return {name: without_timing(entry) for name, entry in value.items() if name not in TIMING}
    return value
