"""`keras_metric` against scikit-learn and NumPy, with uneven weights and padding, on each replica."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import metrics as kinds
from sklearn import metrics as sk

from distloop import RunConfig, minimize
from distloop.errors import UsageError
from distloop.keras_metrics import keras_metric
from distloop.loop import evaluate_once
from distloop.metrics import Metric, mean, results
from distloop.updates import prepare
from tests import toy
from tests.on_replicas import values_on_each_replica

GENERATOR = np.random.default_rng(3)
LABEL = GENERATOR.integers(0, 2, 16)
# No two scores are within a threshold of each other, so that an AUC of 2001 thresholds is the exact one.
SCORE = (GENERATOR.permutation(16) + 0.3 * LABEL + 0.4) / 17
CLASS = GENERATOR.integers(0, 4, 16)
CLASSES = GENERATOR.dirichlet(np.ones(4), 16)
TARGET = GENERATOR.normal(size=(16, 2))
PREDICTED = TARGET + GENERATOR.normal(size=(16, 2))
MAP, PREDICTED_MAP = GENERATOR.integers(0, 3, (2, 16, 2, 3))
# The second batch of 8 ends with padding; on two replicas, the second of them has nothing else.
WHOLE = np.array([1, 2, 1, 1, 3, 1, 1, 1, 2, 1, 1, 1, 0, 0, 0, 0], np.float32)
FRACTIONS = WHOLE * GENERATOR.choice([0.25, 1.5], 16).astype(np.float32)
ONE_HOT = np.eye(4)[CLASS]
BEST = CLASSES.argmax(axis=1)


def values(strategy, metric, y_true, y_pred, weight):
    """Return the float, or the floats, that every replica computes from two batches."""
    arrays = {"y_true": y_true, "y_pred": y_pred, "weight": np.asarray(weight, np.float32)}
    for name in ("y_true", "y_pred"):
        if arrays[name].dtype == np.float64:
            arrays[name] = arrays[name].astype(np.float32)
    batches = [{name: value[begin : begin + 8] for name, value in arrays.items()} for begin in (0, 8)]

    def step(batch):
        return {"m": keras_metric(metric, batch["y_true"], batch["y_pred"], batch["weight"])}

    first, *others = values_on_each_replica(strategy, step, batches)
    for other in others:
        np.testing.assert_equal(other, first)
    return first["m"] if list(first) == ["m"] else list(first.values())


def precision_recall_area(y, p, w):
    """Return the area under the curve whose precision between two points is that of the better one."""
    precision, recall, _ = sk.precision_recall_curve(y, p, sample_weight=w)
    precision[-1] = 0  # without predictions; scikit-learn says 1
    return np.sum(np.maximum(precision[:-1], precision[1:]) * -np.diff(recall))


def counts(y, p, w):
    """Return true negatives, false positives, false negatives and true positives."""
    return sk.confusion_matrix(y, p > 0.5, sample_weight=w).ravel()


BINARY = {
    "BinaryAccuracy": (kinds.BinaryAccuracy, lambda y, p, w: sk.accuracy_score(y, p > 0.5, sample_weight=w)),
    "AUC": (lambda: kinds.AUC(2001), lambda y, p, w: sk.roc_auc_score(y, p, sample_weight=w)),
    "AUC PR": (lambda: kinds.AUC(2001, curve="PR", summation_method="majoring"), precision_recall_area),
    "Precision": (kinds.Precision, lambda y, p, w: sk.precision_score(y, p > 0.5, sample_weight=w)),
    "Recall": (kinds.Recall, lambda y, p, w: sk.recall_score(y, p > 0.5, sample_weight=w)),
    "F1Score": (lambda: kinds.F1Score(threshold=0.5), lambda y, p, w: sk.f1_score(y, p > 0.5, sample_weight=w)),
    "TrueNegatives": (kinds.TrueNegatives, lambda y, p, w: counts(y, p, w)[0]),
    "FalsePositives": (kinds.FalsePositives, lambda y, p, w: counts(y, p, w)[1]),
    "FalseNegatives": (kinds.FalseNegatives, lambda y, p, w: counts(y, p, w)[2]),
    "TruePositives": (kinds.TruePositives, lambda y, p, w: counts(y, p, w)[3]),
    "BinaryCrossentropy": (kinds.BinaryCrossentropy, lambda y, p, w: sk.log_loss(y, p, sample_weight=w)),
    "several thresholds": (
        lambda: kinds.Precision(thresholds=[0.3, 0.6]),
        lambda y, p, w: [sk.precision_score(y, p > t, sample_weight=w) for t in (0.3, 0.6)],
    ),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_metrics_are_those_of_scikit_learn(strategy, name):
    make, reference = BINARY[name]
    with strategy.scope():
        metric = make()
    found = values(strategy, metric, LABEL[:, None], SCORE[:, None], FRACTIONS)
    np.testing.assert_allclose(found, reference(LABEL, SCORE.astype(np.float32), FRACTIONS), atol=2e-6)


MULTICLASS = {
    "SparseCategoricalAccuracy": (
        kinds.SparseCategoricalAccuracy,
        CLASS,
        lambda w: sk.accuracy_score(CLASS, BEST, sample_weight=w),
    ),
    "SparseTopKCategoricalAccuracy": (
        lambda: kinds.SparseTopKCategoricalAccuracy(k=2),
        CLASS,
        lambda w: sk.top_k_accuracy_score(CLASS, CLASSES, k=2, sample_weight=w),
    ),
    "TopKCategoricalAccuracy": (
        lambda: kinds.TopKCategoricalAccuracy(k=3),
        ONE_HOT,
        lambda w: sk.top_k_accuracy_score(CLASS, CLASSES, k=3, sample_weight=w),
    ),
    "F1Score of each class": (
        kinds.F1Score,
        ONE_HOT,
        lambda w: sk.f1_score(CLASS, BEST, average=None, sample_weight=w, zero_division=0),
    ),
    "F1Score, weighted": (
        lambda: kinds.F1Score(average="weighted"),
        ONE_HOT,
        lambda w: sk.f1_score(CLASS, BEST, average="weighted", sample_weight=w, zero_division=0),
    ),
    "AUC of each label": (
        lambda: kinds.AUC(2001, multi_label=True),
        ONE_HOT,
        lambda w: sk.roc_auc_score(ONE_HOT, CLASSES.astype(np.float32), sample_weight=w),
    ),
    "SparseCategoricalCrossentropy": (
        kinds.SparseCategoricalCrossentropy,
        CLASS,
        lambda w: sk.log_loss(CLASS, CLASSES, sample_weight=w),
    ),
}


@pytest.mark.parametrize("name", MULTICLASS)
def test_metrics_of_several_classes_are_those_of_scikit_learn(strategy, name):
    make, y_true, reference = MULTICLASS[name]
    np.testing.assert_allclose(values(strategy, make(), y_true, CLASSES, FRACTIONS), reference(FRACTIONS), atol=2e-6)


REGRESSION = {
    "RootMeanSquaredError": (
        kinds.RootMeanSquaredError,
        lambda w: math.sqrt(sk.mean_squared_error(TARGET, PREDICTED, sample_weight=w)),
    ),
    "MeanAbsoluteError": (
        kinds.MeanAbsoluteError,
        lambda w: sk.mean_absolute_error(TARGET, PREDICTED, sample_weight=w),
    ),
    "R2Score": (kinds.R2Score, lambda w: sk.r2_score(TARGET, PREDICTED, sample_weight=w)),
}


@pytest.mark.parametrize("name", REGRESSION)
def test_metrics_of_regression_are_those_of_scikit_learn(strategy, name):
    make, reference = REGRESSION[name]
    assert values(strategy, make(), TARGET, PREDICTED, FRACTIONS) == pytest.approx(reference(FRACTIONS), abs=2e-6)


@pytest.mark.parametrize(
    ("make", "y_true", "y_pred", "weight"),
    [
        (lambda: kinds.MeanIoU(num_classes=3), MAP, PREDICTED_MAP, WHOLE),
        (lambda: kinds.MeanIoU(num_classes=3, dtype="float32"), MAP, PREDICTED_MAP, FRACTIONS),
        (lambda: kinds.OneHotMeanIoU(num_classes=3), np.eye(3)[MAP], np.eye(3)[PREDICTED_MAP], WHOLE),
    ],
)
def test_mean_iou_of_maps_is_that_of_scikit_learn(strategy, make, y_true, y_pred, weight):
    pixels = np.repeat(weight, MAP[0].size)
    expected = sk.jaccard_score(MAP.ravel(), PREDICTED_MAP.ravel(), average="macro", sample_weight=pixels)
    assert values(strategy, make(), y_true, y_pred, weight) == pytest.approx(expected, abs=1e-6)


def test_weights_of_tokens_leave_out_masked_tokens(strategy):
    labels, scores = GENERATOR.integers(0, 4, (16, 5)), GENERATOR.dirichlet(np.ones(4), (16, 5))
    mask = FRACTIONS[:, None] * (GENERATOR.uniform(size=(16, 5)) < 0.6)
    expected = np.average(scores.argmax(axis=-1) == labels, weights=mask)
    found = values(strategy, kinds.SparseCategoricalAccuracy(), labels, scores, mask)
    assert found == pytest.approx(expected, abs=1e-6)


class Perplexity(kinds.MeanMetricWrapper):
    """The exponential of the mean negative log-likelihood: sums in the state, all else in `result`."""

    def __init__(self):
        super().__init__(keras.losses.sparse_categorical_crossentropy, name="perplexity")

    def result(self):
        return {"value": keras.ops.exp(super().result()), "count": self.count}


def test_a_custom_metric_may_compute_a_dict_of_its_sums(strategy):
    found = values(strategy, Perplexity(), CLASS, CLASSES, FRACTIONS)
    assert found == pytest.approx(
        [math.exp(sk.log_loss(CLASS, CLASSES, sample_weight=FRACTIONS)), FRACTIONS.sum()], rel=1e-5
    )


class OfParts(kinds.Metric):
    """A metric that keeps its state in other metrics."""

    def __init__(self):
        super().__init__()
        self.parts = [kinds.Precision(), kinds.Recall()]

    def update_state(self, y_true, y_pred, sample_weight=None):
        for part in self.parts:
            part.update_state(y_true, y_pred, sample_weight)

    def result(self):
        return [part.result() for part in self.parts]


def test_a_metric_made_of_metrics_works(strategy):
    found = values(strategy, OfParts(), LABEL, SCORE, FRACTIONS)
    expected = [score(LABEL, SCORE > 0.5, sample_weight=FRACTIONS) for score in (sk.precision_score, sk.recall_score)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_variables_of_a_metric_are_neither_read_nor_written(strategy):
    with strategy.scope():
        metric = kinds.Precision()
        metric.true_positives.assign([500.0])
    assert values(strategy, metric, LABEL, SCORE, WHOLE) == pytest.approx(
        sk.precision_score(LABEL, SCORE > 0.5, sample_weight=WHOLE), abs=1e-6
    )
    # A plain assignment in the scope of two replicas divides a sum between them.
    assert metric.true_positives.value.numpy().tolist() == [500.0]
    assert metric.false_positives.value.numpy().tolist() == [0.0]


class Custom(kinds.Metric):
    """One number, which the subclasses get wrong."""

    def __init__(self):
        super().__init__(name="mine")
        self.state = self.add_variable((), "zeros", name="state")

    def result(self):
        return self.state + 0


class RunningMaximum(Custom):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state.assign(tf.maximum(self.state, tf.reduce_max(y_pred * sample_weight)))


class MovingAverage(Custom):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state.assign(0.999 * self.state + 0.001 * tf.reduce_sum(y_pred * sample_weight))


class MeanOfBatchMeans(Custom):
    def update_state(self, y_true, y_pred, sample_weight=None):
        total = tf.reduce_sum(y_pred * sample_weight)
        self.state.assign_add(tf.math.divide_no_nan(total, tf.reduce_sum(sample_weight)))


class IgnoresWeights(Custom):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state.assign_add(tf.reduce_sum(y_pred))


class NormalizesWeights(Custom):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state.assign_add(tf.reduce_sum(y_pred * sample_weight) / tf.reduce_sum(sample_weight))


class TakesNoWeights(Custom):
    def update_state(self, y_true, y_pred):
        self.state.assign_add(tf.reduce_sum(y_pred))


class StartsAtOne(MeanOfBatchMeans):
    def reset_state(self):
        self.state.assign(1.0)


class StateInPython(kinds.Metric):
    def __init__(self):
        super().__init__(name="mine")
        self.state = 0

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.state += tf.reduce_sum(y_pred * sample_weight)

    def result(self):
        return self.state


NO_SUM = "its state is not a sum over examples"
PADDING = "examples of weight 0, such as padding, change it"
REFUSED = {
    "a running maximum": (RunningMaximum, SCORE, NO_SUM),
    "a moving average": (MovingAverage, SCORE, NO_SUM),
    "a mean of the means of batches": (MeanOfBatchMeans, SCORE, NO_SUM),
    "one that ignores weights": (IgnoresWeights, SCORE, PADDING),
    "one that is NaN for nothing but padding": (NormalizesWeights, SCORE, PADDING),
    "one that takes no weights": (TakesNoWeights, SCORE, "does not take (y_true, y_pred, sample_weight)"),
    "Keras's own Mean": (kinds.Mean, SCORE, "use mean(values, weight)"),
    "one that does not start at 0": (StartsAtOne, SCORE, "reset_state does not set its variable 'state' to 0"),
    "one without variables": (StateInPython, SCORE, "it has no variables that could be summed"),
    "one that averages over the batch": (kinds.MeanSquaredError, SCORE, "make y_true and y_pred [batch, 1]"),
    "one that counts padded rows": (lambda: kinds.R2Score(num_regressors=1), SCORE[:, None], PADDING),
    "one that raises": (kinds.F1Score, SCORE, "it raised ValueError (FBetaScore expects 2D inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_metric_that_is_no_sum_over_examples_is_refused_with_the_reason(strategy, name):
    make, score, reason = REFUSED[name]
    label = LABEL.astype(np.float32).reshape(score.shape)
    metric = make()
    with pytest.raises(UsageError) as refusal:
        values(strategy, metric, label, score, WHOLE)
    assert reason in str(refusal.value)
    assert f"{metric.name!r} ({type(metric).__name__})" in str(refusal.value)
    assert 'gather(compute, y_true, y_pred, weight=batch["weight"])' in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("auc", LABEL, SCORE, WHOLE), "keras_metric got a str; expected a metric such as keras.metrics.AUC()"),
        (
            (kinds.AUC(name="a"), LABEL, SCORE[:3], WHOLE),
            "got y_pred of shape (3,) and a weight of shape (16,) for 'a'",
        ),
        ((kinds.AUC(), LABEL, SCORE, np.float32(1)), "got weight of shape ()"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, sentence):
    with pytest.raises(UsageError) as refusal:
        keras_metric(*arguments)
    assert sentence in str(refusal.value)


def test_a_metric_that_counts_in_integers_refuses_fractional_weights_and_counts_it_cannot_hold():
    metric = keras_metric(kinds.MeanIoU(num_classes=3, dtype="int32"), MAP, PREDICTED_MAP, FRACTIONS)
    assert np.count_nonzero(FRACTIONS % 1) == 11
    with pytest.raises(UsageError, match="would cut off the fractional weights of 11 examples; make it with dtype="):
        metric.compute(*(part.numpy().astype(np.float64) for part in metric.parts))
    with pytest.raises(
        UsageError, match="counts in int32, which does not hold 3000000000; make it with dtype='float32'"
    ):
        metric.compute(np.full([3, 3], 3e9), np.zeros([]))


class Watched(kinds.SparseCategoricalAccuracy):
    def __init__(self):
        super().__init__()
        self.seen = []

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.append((tf.executing_eagerly(), *y_pred.shape))
        return super().update_state(y_true, y_pred, sample_weight)


def test_a_metric_is_examined_once_for_each_shape():
    metric, calls = Watched(), []
    for size, classes in ((16, 3), (16, 3), (8, 3), (8, 4)):
        keras_metric(metric, tf.zeros([size]), tf.zeros([size, classes]), tf.ones(size))
        calls.append(len(metric.seen))
    assert calls[1:3] == [calls[0] + 1, calls[0] + 2]
    assert calls[3] == 2 * calls[0] + 2


def test_long_sequences_are_examined_by_four_positions():
    metric = Watched()
    specs = tf.TensorSpec([2, 100], tf.int32), tf.TensorSpec([2, 100, 7]), tf.TensorSpec([2])
    tf.function(lambda *inputs: keras_metric(metric, *inputs).parts, autograph=False).get_concrete_function(*specs)
    assert {tuple(shape[1:]) for eager, *shape in metric.seen if eager} == {(4, 7)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_predictions_in_16_bits_are_taken(dtype):
    predicted = tf.cast(PREDICTED, dtype)
    metric = keras_metric(kinds.CosineSimilarity(), tf.cast(TARGET, tf.float32), predicted, FRACTIONS)
    found = metric.compute(*(part.numpy().astype(np.float64) for part in metric.parts))
    each = [1 - sk.pairwise.cosine_distances(TARGET[i : i + 1], PREDICTED[i : i + 1]).item() for i in range(16)]
    assert found == pytest.approx(np.average(each, weights=FRACTIONS), abs=0.02)


def toy_task(metrics):
    """Return the toy task with `metrics(label, score, weight)` in both of its steps."""
    task = toy.make_task(RunConfig(seed=0))

    def train_step(state, batch):
        def loss_fn(batch):
            label = tf.cast(batch["y"] > 0, tf.float32)
            losses = tf.square(state.model(batch["x"], training=True)[:, 0] - batch["y"])
            return losses, metrics(label[:, None], tf.sigmoid(batch["x"][:, :1]), batch["weight"])

        return minimize(loss_fn, batch, state.optimizer, state.model.trainable_variables)

    def eval_step(state, batch):
        label = tf.cast(batch["y"] > 0, tf.float32)
        return metrics(label[:, None], tf.sigmoid(batch["x"][:, :1]), batch["weight"])

    return dataclasses.replace(task, train_step=train_step, eval_step=eval_step)


def of_toy_data():
    label, score = toy.DATA["y"] > 0, 1 / (1 + np.exp(-toy.DATA["x"][:, 0]))
    return {
        "auc": pytest.approx(sk.roc_auc_score(label, score), abs=1e-6),
        "f1": pytest.approx(sk.f1_score(label, score > 0.5), abs=1e-6),
        "share": pytest.approx(label.mean(), abs=1e-6),
    }


@pytest.mark.parametrize("settings", [{"micro_batches": 2, "ema_momentum": 0.9}, {"jit_compile": True}], ids=str)
def test_an_epoch_of_training_and_an_evaluation_have_the_metrics_of_all_examples(strategy, settings):
    auc, f1 = kinds.AUC(201), kinds.F1Score(threshold=0.5)

    def metrics(label, score, weight):
        return {
            "auc": keras_metric(auc, label, score, weight),
            "f1": keras_metric(f1, label, score, weight),
            "share": mean(label[:, 0], weight),
        }

    task = toy_task(metrics)
    built = dataclasses.replace(task, build=lambda: prepared(task.build(), settings))
    state, stream, call = toy.compiled(strategy, built)
    written = {name: value for name, value in toy.to_numpy(state).items() if "seed_generator" in name}
    result = call(stream.steps_per_epoch)
    found = results(call.metrics, result.sums)
    assert {name: found[name] for name in of_toy_data()} == of_toy_data()
    assert result.first_bad_step == -1
    for name, value in written.items():  # what layers write beside a metric is still written
        assert not np.array_equal(toy.to_numpy(state)[name], value)
    _, stream, call = toy.compiled(strategy, built, training=False)
    assert evaluate_once(call, stream).metrics == of_toy_data()


def prepared(state, settings):
    prepare(state, RunConfig(**settings))
    return state


@pytest.mark.parametrize("training", [True, False])
def test_a_metric_made_in_the_step_is_refused(strategy, training):
    def metrics(label, score, weight):
        return {"auc": keras_metric(kinds.AUC(), label, score, weight)}

    with pytest.raises(UsageError, match="the step creates the variable 'true_positives'"):
        toy.compiled(strategy, toy_task(metrics), training=training)


def test_perplexity_without_keras_is_a_metric_of_two_sums(strategy):
    def step(batch):
        losses = keras.losses.sparse_categorical_crossentropy(batch["y"], batch["p"])
        parts = (tf.reduce_sum(losses * batch["weight"]), tf.reduce_sum(batch["weight"]))
        return {"perplexity": Metric(parts, lambda total, count: math.exp(total / count))}

    batch = {"y": CLASS, "p": CLASSES.astype(np.float32), "weight": FRACTIONS}
    for found in values_on_each_replica(strategy, step, [batch]):
        expected = math.exp(sk.log_loss(CLASS, CLASSES, sample_weight=FRACTIONS))
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
