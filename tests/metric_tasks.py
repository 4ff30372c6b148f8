"""Metrics of every kind over scores that are data, not predictions: what they must be is known without a model.

python -m tests.metric_tasks OUT CONFIG_JSON     trains on TRAIN_SIZE examples and evaluates on each of SIZES
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

TASK = "tests.metric_tasks:make_task"  # by name: its metrics have variables, which need the strategy first
SIZES = (1, 13, 63, 64, 65)
TRAIN_SIZE = 13  # in batches of 8 for four replicas, the last of them has nothing but padding in the second
THRESHOLDS = 500
SIZE = "EXAMPLES"  # the environment says how many examples the evaluation to come has
_metrics = {}  # made once a process, as by a user


def data(size):
    """Return `size` examples; each is the same in every size."""
    rows = [np.random.default_rng(row) for row in range(size)]
    scores = np.stack([row.dirichlet(np.ones(3)) for row in rows]).astype(np.float32)
    label = np.array([row.integers(0, 2) for row in rows], np.int32)
    return {
        "id": np.arange(size, dtype=np.int64),
        "value": np.array([row.normal() for row in rows], np.float32),
        "importance": np.array([row.choice([0.25, 1.0, 3.0]) for row in rows], np.float32),
        "label": label,
        # Better than chance, so that no curve is trivial.
        "score": np.array([0.6 * row.uniform() + 0.4 * y for row, y in zip(rows, label, strict=True)], np.float32),
        "class": np.array([row.integers(0, 3) for row in rows], np.int32),
        "classes": scores,
        "map": np.stack([row.integers(0, 3, (2, 2)) for row in rows]).astype(np.int32),
        "predicted_map": np.stack([row.integers(0, 3, (2, 2)) for row in rows]).astype(np.int32),
    }


def make_task(config):
    """Return a task whose steps measure `data`; what they train is of no interest."""
    import keras
    import tensorflow as tf

    from distloop import Metric, State, Task, gather, keras_metric, mean, minimize

    size, metrics, kinds = int(os.environ.get(SIZE, TRAIN_SIZE)), _metrics, keras.metrics
    metrics.setdefault("accuracy", kinds.SparseCategoricalAccuracy())
    metrics.setdefault("auc", kinds.AUC(num_thresholds=THRESHOLDS))
    metrics.setdefault("f1", kinds.F1Score(threshold=0.5))

    def build():
        # In the scope of the strategy, where these have a variable on each replica.
        metrics.setdefault("precision", kinds.Precision())
        metrics.setdefault("recall", kinds.Recall())
        metrics.setdefault("iou", kinds.MeanIoU(num_classes=3))
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        return State(model=model, optimizer=keras.optimizers.SGD(0.1))

    def train_step(state, batch):
        def loss_fn(batch):
            found = {
                "mean": mean(batch["value"], batch["weight"]),
                "accuracy": keras_metric(metrics["accuracy"], batch["class"], batch["classes"], batch["weight"]),
                "auc": keras_metric(metrics["auc"], batch["label"], batch["score"], batch["weight"]),
            }
            return tf.square(state.model(batch["value"][:, None])[:, 0]), found

        return minimize(loss_fn, batch, state.optimizer, state.model.trainable_variables)

    def eval_step(state, batch):
        weight, label, score = batch["weight"], batch["label"], batch["score"]
        return {
            "examples": Metric((tf.reduce_sum(weight),), float),
            "mean": mean(batch["value"], weight),
            "weighted_mean": mean(batch["value"], weight * batch["importance"]),
            "order": gather(lambda ids: float(np.array_equal(ids, np.arange(size))), batch["id"], weight=weight),
            "accuracy": keras_metric(metrics["accuracy"], batch["class"], batch["classes"], weight),
            "auc": keras_metric(metrics["auc"], label, score, weight),
            "exact_auc": gather(roc_auc, label, score, weight=weight),
            "f1": keras_metric(metrics["f1"], label[:, None], score[:, None], weight),
            "precision": keras_metric(metrics["precision"], label, score, weight),
            "recall": keras_metric(metrics["recall"], label, score, weight * batch["importance"]),
            "iou": keras_metric(metrics["iou"], batch["map"], batch["predicted_map"], weight),
            "median": gather(np.median, batch["value"], weight=weight),
            "highest": gather(lambda classes: {"score": classes.max(axis=0)}, batch["classes"], weight=weight),
        }

    return Task(build, train_step, lambda: data(TRAIN_SIZE), eval_step, lambda: data(size))


def roc_auc(label, score):
    """Return scikit-learn's exact area under the curve, 0 where there is none."""
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(label, score) if len(set(label.tolist())) > 1 else 0.0


def main():
    """Write what this worker is told by `train`, and by `evaluate` of each size."""
    from distloop import RunConfig, evaluate, train
    from distloop.cluster import from_tf_config

    out, config = sys.argv[1], RunConfig(**json.loads(sys.argv[2]))
    worker = from_tf_config(os.environ.get("TF_CONFIG")).index

    def write_on_the_chief(progress):
        if worker == 0:
            Path(f"{out}.seen.json").write_text(json.dumps([progress.step, progress.metrics]))

    summary = train(TASK, config, extra_actions=[write_on_the_chief])
    found = {"summary": summary, TRAIN_SIZE: summary["eval"]}
    for size in set(SIZES) - {TRAIN_SIZE}:
        os.environ[SIZE] = str(size)
        found[size] = evaluate(TASK, config)
    Path(f"{out}.worker{worker}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
