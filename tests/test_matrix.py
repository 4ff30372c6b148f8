"""Promise P1, the whole of it: each row on each column gives the numbers of one device, on every replica and worker.

docs/equivalence.md shows the measured differences as a table.
"""

import re

import numpy as np
import pytest
import tensorflow as tf

from distloop.data import make_stream, per_replica_batches
from tests import matrix
from tests.columns import COLUMNS, REFERENCE
from tests.matrix import counters_differ, difference, replicas_of, tolerance, weights_of
from tests.matrix_rows import BATCH, ROWS, STEPS, X, Y

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return matrix.run_column(REFERENCE, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module", params=[column for column in COLUMNS if column != REFERENCE])
def column(request, tmp_path_factory):
    return matrix.run_column(request.param, tmp_path_factory.mktemp("column"))


@pytest.mark.parametrize("row", ROWS)
def test_weights_slots_and_step_losses_are_those_of_one_device(reference, column, row):
    assert difference(row, column[row], reference[row]) <= tolerance(row, reference[row])
    assert counters_differ(column[row], reference[row]) == []


@pytest.mark.parametrize("row", ROWS)
def test_replicas_and_workers_hold_the_same_bits(column, row):
    first = column[row][0]
    for arrays in column[row]:
        for key, value in arrays.items():
            replica, _, name = key.partition(":")
            if not name.endswith("seed_generator_state"):  # seeds differ on purpose
                np.testing.assert_array_equal(value, first["0:" + name if replica.isdigit() else key], err_msg=key)


def batches(seed=3):
    """Return the global batches of the run, as the data gives them to one device."""
    stream = make_stream({"x": X, "y": Y}, name="data", global_batch_size=BATCH, seed=seed)
    dataset = per_replica_batches(stream, tf.distribute.InputContext(), first_step=0)
    return [(batch["x"], batch["y"]) for batch in dataset.take(STEPS).as_numpy_iterator()]


def momentum(rate=0.05, beta=0.9):
    velocity = 0.0

    def update(weights, gradient, step):
        nonlocal velocity
        velocity = beta * velocity - rate * gradient
        return weights + velocity

    return update


def adam(rate=0.05, beta_1=0.9, beta_2=0.999, epsilon=1e-7, decay=0.0):
    """Adam as in its paper (https://arxiv.org/abs/1412.6980), with the decay of AdamW taken off first.

    The powers of the betas are float32, as in Keras: 1 - 0.999 in float32 is off by 1e-5, and all else follows from it.
    """
    first = second = 0.0

    def update(weights, gradient, step):
        nonlocal first, second
        weights = weights - rate * decay * weights
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        power_1, power_2 = np.float32([beta_1, beta_2]) ** np.float32(step + 1)
        corrected = rate * float(np.sqrt(1 - power_2) / (1 - power_1))
        return weights - corrected * first / (np.sqrt(second) + epsilon)

    return update


NUMPY = {
    "SGD": lambda: lambda weights, gradient, step: weights - 0.05 * gradient,
    "momentum": momentum,
    "Adam": adam,
    "AdamW, weight decay": lambda: adam(decay=0.1),
}


@pytest.mark.parametrize("row", NUMPY)
def test_plain_rows_are_what_numpy_computes(reference, row):
    (arrays,) = reference[row]
    kernel = next(key for key in arrays if key.startswith("0:model/") and key.endswith("kernel"))
    start = arrays["start:" + kernel.partition(":")[2]]
    weights, update = np.append(start[:, 0], 0.0).astype(np.float64), NUMPY[row]()
    for step, (x, y) in enumerate(batches()):
        inputs = np.column_stack([x, np.ones(len(x))])
        errors = inputs @ weights - y
        assert arrays["metric:loss"][step] == pytest.approx(np.mean(errors**2), rel=1e-5)
        weights = update(weights, 2 * errors @ inputs / len(x), step)
    ours = np.append(arrays[kernel][:, 0], arrays[kernel.replace("kernel", "bias")])
    assert np.linalg.norm(ours - weights) <= 1e-5 * np.linalg.norm(weights)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_step_over_the_whole_batch(reference, parts):
    one, accumulated = (weights_of(reference[f"accumulation {k}"][0], "0") for k in (1, parts))
    assert np.linalg.norm(accumulated - one) <= 1e-6 * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        *((f"clip, {kind}", "accumulation 1") for kind in ("global norm", "each variable", "value")),
        ("transform", "accumulation 1"),
        ("sample weights", "accumulation 1"),
        ("weight penalties", "accumulation 1"),
        ("learning-rate schedule", "accumulation 1"),
    ],
)
def test_what_a_row_asks_for_has_an_effect(reference, row, plain):
    ours, others = (weights_of(reference[name][0], "0") for name in (row, plain))
    assert np.linalg.norm(ours - others) > 1e-3 * np.linalg.norm(others)


def test_jit_compile_changes_no_number_by_more_than_1e_5(reference):
    compiled, plain = (reference[row] for row in ("jit_compile", "accumulation 1"))
    assert difference("jit_compile", compiled, plain) <= 1e-5


def test_clip_norm_1_of_gradients_3_and_6_moves_by_1_a_step(reference, column):
    for arrays in (*reference["clip norm 1 of 3 and 6"], *column["clip norm 1 of 3 and 6"]):
        for replica in replicas_of(arrays):
            np.testing.assert_allclose(weights_of(arrays, replica), [-STEPS], rtol=1e-6)


def test_the_page_shows_every_row_and_column_within_its_tolerance():
    lines = [line.strip("| ").split(" | ") for line in matrix.PAGE.read_text().splitlines() if line.startswith("| ")]
    header, _, *rows = lines
    assert header == ["row", "tolerance", *(column for column in COLUMNS if column != REFERENCE)]
    assert [row[0] for row in rows] == list(ROWS)
    for row in rows:
        assert all(re.fullmatch(r"\d(\.\d)?e[+-]\d\d", cell) for cell in row[1:])
        assert max(map(float, row[2:])) <= float(row[1])
