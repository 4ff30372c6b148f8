"""Keras `fit`: its own step, loss tracker and loop, on a model whose outputs are the task's loss and metrics."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, final

import keras

from benchmarks.peer_step import forward, look, optimizer_of
from benchmarks.timing import Train
from distloop.startup import Setup
from distloop.task import Batch

_ENDLESS = 2**31  # epochs
_LOSS_PARTS = 2  # which Keras tracks itself


@final
class _Model(keras.Model):
    """Give `fit` the loss and the metrics of a task by the methods that Keras has for it."""

    def __init__(self, layers: list[keras.Layer], outputs: Callable[[Batch], Any], parts: list[str]) -> None:
        super().__init__(name="peer", dtype="float32")  # the layers have their own precision
        self.task_layers = layers
        self.outputs_of = outputs
        self.part_sums = [keras.metrics.Sum(name) for name in parts]
        self.built = True

    def call(self, batch: Batch, training: bool | None = None) -> Any:
        """Return this replica's share of the loss, and the metrics' parts."""
        return self.outputs_of(batch)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        """Return what this replica adds to the mean loss of the global batch, as Keras's losses do."""
        share, _ = y_pred
        return share

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Add up the metrics' parts."""
        _, parts = y_pred
        for total, part in zip(self.part_sums, parts, strict=True):
            total.update_state(part)
        return self.get_metrics_result()


def _model(setup: Setup, dataset: Any) -> _Model:
    def outputs(batch: Batch) -> Any:
        found = forward(setup, batch)
        parts = [part for metric in found.metrics.values() for part in metric.parts]
        return found.share, parts[_LOSS_PARTS:]

    layers = [part for part in setup.state.parts.values() if isinstance(part, keras.Layer)]
    with setup.strategy.scope():
        model = _Model(layers, outputs, look(setup, dataset).parts[_LOSS_PARTS:])
        # Its default, "auto", would pick XLA where it can.
        model.compile(optimizer_of(setup), jit_compile=setup.config.jit_compile)  # pyright: ignore[reportArgumentType]
    return model


@contextmanager
def one_step_an_execution(setup: Setup, dataset: Any) -> Iterator[Train]:
    """Fit with `steps_per_execution` 1, the default."""
    model = _model(setup, dataset)
    with _fitting(model, dataset, lambda steps: None) as call:
        yield call


@contextmanager
def many_steps_an_execution(setup: Setup, dataset: Any) -> Iterator[Train]:
    """Fit with the largest `steps_per_execution` that is at most `steps_per_call` and divides the steps of a call."""
    model = _model(setup, dataset)
    functions: dict[int, Any] = {}  # compiled for one number of steps each

    def prepare(steps: int) -> None:
        size = max(size for size in range(1, setup.config.steps_per_call + 1) if steps % size == 0)
        model.steps_per_execution = size
        if size not in functions:
            model.make_train_function(force=True)
            functions[size] = model.train_function
        model.train_function = functions[size]

    with _fitting(model, dataset, prepare) as call:
        yield call


@contextmanager
def _fitting(model: keras.Model, dataset: Any, prepare: Callable[[int], None]) -> Iterator[Train]:
    """Fit in a thread, an epoch a call: one `fit` as long as calls have one length, so that its start is not measured.

    Each `fit` begins the data anew.
    """
    asked: SimpleQueue[int] = SimpleQueue()
    told: SimpleQueue[float | BaseException] = SimpleQueue()

    def fit() -> None:
        try:
            steps = asked.get()
            while steps:
                prepare(steps)
                epochs = _Calls(told, asked, steps)
                model.fit(
                    dataset,
                    steps_per_epoch=steps,
                    epochs=_ENDLESS,
                    shuffle=False,
                    verbose=0,  # pyright: ignore[reportArgumentType] (typed as a string)
                    callbacks=[epochs],
                )
                steps = epochs.next_steps
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()

    def call(num_steps: int) -> float:
        asked.put(num_steps)
        loss = told.get()
        if isinstance(loss, BaseException):
            raise loss
        return loss

    try:
        yield call
    finally:
        asked.put(0)
        thread.join()


@final
class _Calls(keras.callbacks.Callback):
    """Make an epoch a call: tell its loss, wait for the next call, and end `fit` if that has another length."""

    def __init__(self, told: "SimpleQueue[Any]", asked: "SimpleQueue[int]", steps: int) -> None:
        super().__init__()
        self._told, self._asked, self._steps = told, asked, steps
        self.next_steps = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """See the class."""
        self._told.put(float(logs["loss"]))
        self.next_steps = self._asked.get()
        if self.next_steps != self._steps:
            self.model.stop_training = True  # pyright: ignore[reportOptionalMemberAccess]
