"""What a run asks of every update: clipping, accumulation, XLA, loss scale, averages of the weights.

`prepare` makes the variables for it and hangs an `UpdateRule` on each optimizer, where `minimize` finds it: the
settings then hold for any task, without a line in its step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.precision import LossScale, Scaling
from distloop.sharding import shard
from distloop.task import State

# What Keras optimizers decide on the gradients of one replica, and distloop on the reduced ones.
_OURS_FOR = {
    "clipnorm": "--clip_norm",
    "clipvalue": "--clip_value",
    "global_clipnorm": "--clip_global_norm",
    "gradient_accumulation_steps": "--micro_batches",
    "use_ema": "--ema_momentum",
    "loss_scale_factor": "--loss_scale",
}


@dataclass(frozen=True)
class UpdateRule:
    """Say how `minimize` updates with one optimizer. Norms are of the reduced, unscaled gradients."""

    clip_global_norm: float | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    gradient_norm: bool = False
    micro_batches: int = 1
    jit_compile: bool = False
    bytes_per_pack: int | None = None
    wire_dtype: str = "float32"  # in which gradients travel from replica to replica
    loss_scale: LossScale | None = None
    ema_momentum: float = 0.0
    averages: Mapping[int, tf.Variable] = field(default_factory=dict)  # by id of the variable


def rule_of(optimizer: keras.optimizers.Optimizer) -> UpdateRule:
    """Return the rule that `prepare` gave the optimizer, else the plain one."""
    return getattr(optimizer, "_distloop_rule", None) or UpdateRule()


def has_rule(optimizer: keras.optimizers.Optimizer) -> bool:
    """Return whether `prepare` has seen the optimizer."""
    return getattr(optimizer, "_distloop_rule", None) is not None


def set_rule(optimizer: keras.optimizers.Optimizer, rule: UpdateRule) -> None:
    """Make `minimize` follow `rule` when it updates with `optimizer`."""
    optimizer._distloop_rule = rule


def check_optimizer(optimizer: object) -> None:
    """Raise UsageError if an optimizer would do itself, on local gradients, what distloop does on reduced ones."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UsageError(
            "a Keras LossScaleOptimizer decides on the gradients of one replica, which is wrong on several "
            "(keras#18666); pass its inner optimizer and --precision=mixed_float16, which brings a loss scale."
        )
    for theirs, ours in _OURS_FOR.items():
        if getattr(optimizer, theirs, None):
            raise UsageError(
                f"the optimizer has {theirs}={getattr(optimizer, theirs)}, which Keras applies to the gradients of one "
                f"replica, before they are summed; drop it and use {ours}."
            )


def prepare(state: State, config: RunConfig) -> None:
    """Give each optimizer of `state` its rule, and `state` the variables for it. In the strategy's scope."""
    for name, optimizer in state.parts.items():
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            continue
        check_optimizer(optimizer)
        for variable in optimizer._trainable_variables if config.ema_momentum is not None else ():
            if id(variable) not in state.averages:
                average = tf.Variable(variable.value, trainable=False)
                state.averages[id(variable)] = (variable, average)
                state.added[f"average/{name}/{variable.path}"] = average
        if config.shard_optimizer:
            state.sharded |= shard(optimizer)
        loss_scale = None
        if config.precision == "mixed_float16":
            loss_scale = LossScale(_scaling(config))
            state.added |= {f"loss_scale/{name}/{key}": value for key, value in loss_scale.variables.items()}
        if config.wire_dtype != "float32" and isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
            raise UsageError(
                f"wire_dtype is {config.wire_dtype}, but strategy is tpu, for which it was not made; drop one."
            )
        rule = UpdateRule(
            clip_global_norm=config.clip_global_norm,
            clip_norm=config.clip_norm,
            clip_value=config.clip_value,
            gradient_norm=config.gradient_norm,
            micro_batches=config.micro_batches,
            jit_compile=config.jit_compile is True,  # auto has not decided yet
            bytes_per_pack=config.bytes_per_pack,
            wire_dtype=config.wire_dtype,
            loss_scale=loss_scale,
            ema_momentum=config.ema_momentum or 0.0,
            averages={key: average for key, (_, average) in state.averages.items()},
        )
        set_rule(optimizer, rule)


def clip(gradients: Sequence[tf.Tensor], rule: UpdateRule) -> list[tf.Tensor]:
    """Clip dense, reduced gradients as the rule says: by value, then by variable, then all together."""
    clipped = list(gradients)
    if rule.clip_value is not None:
        clipped = [tf.clip_by_value(g, -rule.clip_value, rule.clip_value) for g in clipped]
    if rule.clip_norm is not None:
        clipped = [tf.clip_by_norm(g, rule.clip_norm) for g in clipped]
    if rule.clip_global_norm is not None:
        clipped, _ = tf.clip_by_global_norm(clipped, rule.clip_global_norm)
    return clipped


def update_averages(variables: Sequence[keras.Variable], rule: UpdateRule) -> None:
    """Move the averages of `variables` towards them: m * average + (1 - m) * variable. Replica context."""
    for variable in variables:
        average = rule.averages.get(id(variable))
        if average is not None:
            average.assign_add((1.0 - rule.ema_momentum) * (tf.convert_to_tensor(variable.value) - average))


def _scaling(config: RunConfig) -> Scaling:
    if config.loss_scale is not None:
        return Scaling(config.loss_scale, growth_steps=2**62, growth_factor=1.0, backoff_factor=1.0, floor=0.0)
    return Scaling(
        config.initial_loss_scale,
        config.loss_scale_growth_steps,
        config.loss_scale_growth_factor,
        config.loss_scale_backoff_factor,
        config.min_loss_scale,
    )
