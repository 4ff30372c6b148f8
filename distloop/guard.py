"""Stop a run whose numbers have left the finite: by name, on every worker, before a checkpoint keeps them."""

from collections.abc import Callable

import keras
import tensorflow as tf

from distloop.errors import NotFiniteError
from distloop.loop import Progress
from distloop.sharding import ShardedSlot
from distloop.task import State, named_variables

MAX_SKIPPED_IN_A_ROW = 50  # at the lowest loss scale


def stop_if_not_finite(state: State, *, every: int) -> Callable[[Progress], None]:
    """Return an action that raises NotFiniteError on every worker alike if the run has diverged.

    It looks at the metrics of each call, and at the variables when a metric is bad and where a checkpoint follows:
    `every` so many steps, at a stop and at the end.
    """
    streaks = {name: variable for name, variable in state.added.items() if name.endswith("/streak")}

    def act(progress: Progress) -> None:
        bad_step = progress.first_bad_step
        if (
            bad_step is not None
            or progress.stopping
            or progress.step % every == 0
            or progress.step == progress.total_steps
        ):
            variable = first_not_finite(state)
            if bad_step is not None:
                metric = next(iter(progress.bad_metrics), "a metric")
                where = f"; the variable {variable!r} is not finite either" if variable else ""
                raise NotFiniteError(f"the metric {metric!r} stopped being finite at step {bad_step}{where}. {_ADVICE}")
            if variable:
                raise NotFiniteError(f"the variable {variable!r} is not finite at step {progress.step}. {_ADVICE}")
        for name, streak in streaks.items():
            skipped = -int(streak.numpy())
            if skipped >= MAX_SKIPPED_IN_A_ROW:
                raise NotFiniteError(
                    f"the optimizer {name.split('/')[1]!r} skipped the last {skipped} steps: its gradients are not "
                    f"finite even at the lowest loss scale. {_ADVICE}"
                )

    return act


_ADVICE = (
    "Lower the learning rate, clip (--clip_global_norm) or look for a division or logarithm of 0; "
    "checkpoints from before are kept."
)


def first_not_finite(state: State) -> str | None:
    """Return the name of the first weight, slot or average that holds an infinity or a NaN, as this worker sees it."""
    # A variable that the user made may hold an infinity on purpose, such as the best value so far.
    plain = {name for name, part in state.parts.items() if isinstance(part, tf.Variable | keras.Variable)}
    for name, variable in named_variables(state).items():
        if name not in plain and variable.dtype.is_floating and not _is_finite(variable):
            return name
    return None


def _is_finite(variable: tf.Variable | ShardedSlot) -> bool:
    return variable.is_finite() if isinstance(variable, ShardedSlot) else tf.reduce_all(tf.math.is_finite(variable))
