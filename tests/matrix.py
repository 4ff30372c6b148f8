"""Run the equivalence matrix and compare its columns; `python -m tests.matrix` writes docs/equivalence.md anew."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np

from tests import harness
from tests.columns import COLUMNS, REFERENCE, run_processes
from tests.matrix_rows import BATCH, ROWS, STEPS

FLOAT32_TOLERANCE = 1e-5  # relative, after 20 steps
LIMIT_SECS = 400  # for the rows of a column together
PAGE = harness.ROOT / "docs/equivalence.md"


def run_column(column, folder):
    """Train every row in one column; return for each row what each worker holds: {row: [arrays of a worker]}."""
    arguments = ["-m", "tests.run_matrix_column", str(folder), json.dumps(COLUMNS[column].settings)]
    run_processes(column, arguments, limit_secs=LIMIT_SECS)
    return {
        row: [dict(np.load(folder / f"{number}.worker{w}.npz")) for w in range(COLUMNS[column].workers)]
        for number, row in enumerate(ROWS)
    }


def replicas_of(arrays):
    return sorted({key.partition(":")[0] for key in arrays} - {"metric", "start"})


def weights_of(arrays, replica):
    """Return the weights, statistics and averages as one float64 vector."""
    return _vector(arrays, replica, lambda part: part in ("model", "generator", "critic", "average"))


def _vector(arrays, replica, wanted):
    names = [key for key in sorted(arrays) if key.startswith(f"{replica}:") and wanted(re.split("[:/]", key)[1])]
    assert names
    return np.concatenate([arrays[name].ravel().astype(np.float64) for name in names if "seed" not in name])


def difference(row, workers, reference):
    """Return the largest relative distance to the reference, over replicas and workers.

    Of each variable (weights, statistics, averages, slots) by itself, and of each metric over the steps.
    """
    (expected,) = reference
    if ROWS[row].epsilon is not None:
        return _difference_in_16_bits(workers, expected)
    found = []
    for arrays in workers:
        for key, theirs in expected.items():
            kind, _, name = key.partition(":")
            if kind == "start" or "seed" in name or theirs.dtype.kind != "f":
                continue
            for ours in [arrays[key]] if kind == "metric" else [arrays[f"{r}:{name}"] for r in replicas_of(arrays)]:
                apart = np.linalg.norm(ours.astype(np.float64) - theirs)
                found.append(apart / max(np.linalg.norm(theirs.astype(np.float64)), 1e-30) if apart else 0.0)
    return max(found)


def counters_differ(workers, reference):
    """Return the integers (steps, iterations, skipped steps) that are not those of the reference."""
    (expected,) = reference
    return [
        (key, replica)
        for arrays in workers
        for key, theirs in expected.items()
        for replica in replicas_of(arrays)
        if key.startswith("0:") and theirs.dtype.kind == "i" and "seed" not in key
        if arrays[f"{replica}:{key[2:]}"] != theirs
    ]


def _difference_in_16_bits(workers, expected):
    """Return the relative distance of the weights, or what explains the loss: |d loss| / (|gradient| |weights|)."""
    theirs = weights_of(expected, "0")
    length = np.linalg.norm(theirs)
    found = []
    for arrays in workers:
        found.extend(np.linalg.norm(weights_of(arrays, r) - theirs) / length for r in replicas_of(arrays))
        apart = np.abs(arrays["metric:loss"] - expected["metric:loss"])
        found.append(np.max(apart / (expected["metric:gradient_norm"] * length)))
    return max(found)


def tolerance(row, reference):
    """Return what may differ: 1e-5 for float32; for 16 bits, what their rounding can do along the path of the weights.

    Each entry of a replica's gradient is rounded in 16 bits (relative error at most epsilon / 2 an operation; forward
    and backward of two layers are a chain of 4 roundings), on both sides of the comparison: 4 epsilon. The errors of 20
    steps add up at worst to that part of the length of the path, learning rate * gradient norm summed over the steps.
    A loss sees weights that are rounded themselves, to one epsilon.
    """
    epsilon = ROWS[row].epsilon
    if epsilon is None:
        return FLOAT32_TOLERANCE
    (expected,) = reference
    path = 0.05 * expected["metric:gradient_norm"].sum()
    return epsilon * (4 * path / np.linalg.norm(weights_of(expected, "0")) + 1)


def write_page(table, tolerances):
    """Write the measured differences as docs/equivalence.md."""
    others = [column for column in COLUMNS if column != REFERENCE]
    lines = [
        "# The same numbers on every strategy",
        "",
        "Written by `python -m tests.matrix`; `tests/test_matrix.py` holds each cell to its tolerance. A cell is the",
        f"largest relative difference to one device after {STEPS} steps, global batch {BATCH}: of any variable",
        "(weight, statistic, average, slot) and of the loss and metrics logged at each step, over all replicas and all",
        "workers. Replicas and workers among themselves hold the same bits, and counters are equal. In the two rows of",
        "16 bits it is the distance of all weights together, or what would explain the difference of a step's loss.",
        "",
        f"| row | tolerance | {' | '.join(others)} |",
        f"| --- | --- |{' --- |' * len(others)}",
    ]
    for row in ROWS:
        cells = " | ".join(f"{table[row][column]:.0e}" for column in others)
        lines.append(f"| {row} | {tolerances[row]:.0e} | {cells} |")
    PAGE.write_text("\n".join(lines) + "\n")


def main():
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for number, column in enumerate(COLUMNS):
            (Path(folder) / str(number)).mkdir()
            runs[column] = run_column(column, Path(folder) / str(number))
            print(f"{column}: done")
    reference = runs[REFERENCE]
    table = {row: {column: difference(row, runs[column][row], reference[row]) for column in COLUMNS} for row in ROWS}
    write_page(table, {row: tolerance(row, reference[row]) for row in ROWS})


if __name__ == "__main__":
    main()
