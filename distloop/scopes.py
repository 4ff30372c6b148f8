"""Where what Keras layers write in a step goes: kept as values within a loss function, refused outside of one."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, final

import keras
import tensorflow as tf
from keras.src.backend.common import global_state  # private: whether a layer is being called; a test pins it

from distloop.errors import UsageError


@final
class PureScope(keras.StatelessScope):
    """Let layers read `values` in place of their variables, and keep what they write instead of writing it.

    `written` are the variables that were given or written, by id; `state_mapping` has their values.
    """

    def __init__(self, values: Sequence[tuple[keras.Variable, tf.Tensor]]) -> None:
        super().__init__(state_mapping=values, collect_losses=True)
        self.written = {id(variable): variable for variable, _ in values}

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Keep a variable's new value."""
        variable, _ = update
        _refuse_metric(variable)
        super().add_update(update)
        self.written[id(variable)] = variable

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return what a variable reads as; Keras's own method returns None to `model.losses` for unmapped ones."""
        value = super().get_current_value(variable)
        return variable._value if value is None else value


@final
class StepScope(keras.StatelessScope):
    """Let a step read `values` in place of their variables, and refuse what layers write outside of a loss function.

    Each replica would write for itself, and a checkpoint would keep the first one's. Seeds are written, as all replicas
    move theirs alike, and what the step itself assigns, such as the weights of a mean teacher.
    """

    def __init__(
        self,
        values: Sequence[tuple[keras.Variable, Any]] = (),
        *,
        riders: tf.Tensor,
        mark_part: Callable[[Sequence[tf.Tensor]], None],
    ) -> None:
        super().__init__(state_mapping=values)
        self.has_unnamed_minimize = False
        self.riders = riders  # what the host adds to the step's first reduction, `[n]` float32,
        self.reduced_riders: tf.Tensor | None = None  # its sum over replicas, once a reduction has taken it,
        self.mark_part = mark_part  # and what to tell before it: all that this replica has computed for it

    def __enter__(self) -> "StepScope":
        self._token = _current.set(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)
        super().__exit__(*error)

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Write, but raise UsageError on what only `minimize` may."""
        variable, value = update
        _refuse_metric(variable)
        if variable.name == "iteration":
            raise UsageError(
                f"the step applies an optimizer itself (it writes {variable.path!r}); use minimize, which sums the "
                "gradients of all replicas once."
            )
        if variable.name != "seed_generator_state" and global_state.get_global_attribute("current_call_ctx"):
            raise UsageError(
                f"a layer writes {variable.path!r} outside of a loss function, where each replica writes for itself; "
                "call the model in the function given to minimize, or with training=False."
            )
        with suspended():
            variable.assign(value)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return what a variable reads as."""
        value = super().get_current_value(variable)
        return variable._value if value is None else value


_current: ContextVar[StepScope | None] = ContextVar("current_step_scope", default=None)


def current_step() -> StepScope | None:
    """Return the scope of the step that is being traced in this thread, if any."""
    return _current.get()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Let Keras variables be written in here, though within a step: the update itself."""
    scope = _current.get()
    if scope is None:
        yield
        return
    keras.StatelessScope.__exit__(scope)
    try:
        yield
    finally:
        keras.StatelessScope.__enter__(scope)


def _refuse_metric(variable: keras.Variable) -> None:
    if variable.aggregation == "sum":  # only Keras metrics have such variables
        raise UsageError(
            f"the step updates the Keras metric of the variable {variable.path!r}; return it instead, as "
            "keras_metric(metric, y_true, y_pred, weight)."
        )
