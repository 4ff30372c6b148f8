"""Metrics against NumPy and scikit-learn, for even and uneven sizes, in real processes, on every worker."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.columns import COLUMNS, run_processes
from tests.metric_tasks import SIZES, THRESHOLDS, TRAIN_SIZE, data, roc_auc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder):
    """Run each column; return {column: [what each worker was told]}."""
    for column in COLUMNS:
        settings = COLUMNS[column].settings
        config = {**settings, "workdir": str(folder / column), "global_batch_size": 8, "epochs": 1}
        run_processes(column, ["-m", "tests.metric_tasks", str(folder / f"{column} out"), json.dumps(config)])
    return {
        column: [
            json.loads((folder / f"{column} out.worker{worker}.json").read_text())
            for worker in range(COLUMNS[column].workers)
        ]
        for column in COLUMNS
    }


def auc_at_thresholds(label, score):
    """Integrate the ROC curve of THRESHOLDS even thresholds by trapezoids."""
    inner = np.arange(1, THRESHOLDS - 1) / (THRESHOLDS - 1)
    above = score[None, :] > np.concatenate([[-1e-7], inner, [1 + 1e-7]])[:, None]
    true, false = (above @ (label == which).astype(np.float64) for which in (1, 0))
    if not true[0] or not false[0]:
        return 0.0
    heights, bases = true / true[0], false / false[0]
    return ((heights[1:] + heights[:-1]) / 2 * (bases[:-1] - bases[1:])).sum()


def expected(size):
    """Compute every metric of `tests.metric_tasks` from the arrays, with NumPy and scikit-learn alone."""
    d = data(size)
    predicted, label = d["score"] > 0.5, d["label"]
    return {
        "examples": size,
        "mean": d["value"].mean(dtype=np.float64),
        "weighted_mean": np.average(d["value"].astype(np.float64), weights=d["importance"]),
        "order": 1.0,
        "accuracy": sk.accuracy_score(d["class"], d["classes"].argmax(axis=1)),
        "auc": auc_at_thresholds(label, d["score"]),
        "exact_auc": roc_auc(label, d["score"]),
        "f1": sk.f1_score(label, predicted, zero_division=0),
        "precision": sk.precision_score(label, predicted, zero_division=0),
        "recall": sk.recall_score(label, predicted, sample_weight=d["importance"], zero_division=0),
        "iou": sk.jaccard_score(d["map"].ravel(), d["predicted_map"].ravel(), average="macro"),
        "median": np.median(d["value"]),
        **{f"highest_score_{index}": highest for index, highest in enumerate(d["classes"].max(axis=0))},
    }


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("size", SIZES)
def test_an_evaluation_has_the_values_of_numpy_and_scikit_learn_on_every_worker(found, column, size):
    reference = expected(size)
    for worker in found[column]:
        assert set(worker[str(size)]) == set(reference)
        for name, value in worker[str(size)].items():
            assert value == pytest.approx(reference[name], abs=2e-6), name


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_for_many_thresholds_is_near_the_exact_area(size):
    d = data(size)
    assert auc_at_thresholds(d["label"], d["score"]) == pytest.approx(roc_auc(d["label"], d["score"]), abs=0.01)


@pytest.mark.parametrize("column", COLUMNS)
def test_an_epoch_of_training_has_the_values_of_numpy_on_every_worker(found, column):
    reference = expected(TRAIN_SIZE)
    for worker in found[column]:
        for name in ("mean", "accuracy", "auc"):
            assert worker["summary"]["train"][name] == pytest.approx(reference[name], abs=2e-6), name
        assert worker["summary"]["eval_count"] == TRAIN_SIZE


@pytest.mark.parametrize("column", COLUMNS)
def test_all_workers_and_an_action_of_the_chief_alone_read_the_same_floats(found, folder, column):
    # That both workers came to their end in time is asserted by the harness: reading is no collective.
    first, *others = found[column]
    for worker in others:
        for size in SIZES:
            assert worker[str(size)] == first[str(size)]
        assert worker["summary"]["train"] == first["summary"]["train"]
    step, seen = json.loads((folder / f"{column} out.seen.json").read_text())
    assert step == math.ceil(TRAIN_SIZE / 8)
    assert seen == first["summary"]["train"]  # one call is the epoch
