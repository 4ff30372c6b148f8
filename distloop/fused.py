"""Updates in one pass over the weights, by kernels of TensorFlow that Keras 3 does not use.

Keras's Adam makes about a dozen passes over each variable and holds several of its size for a while; the kernel makes
one, on all cores, and holds nothing. Formulas, slots and with them checkpoints are Keras's, and the weights agree to
1e-6. Only Adam's second moment differs, in its fifth digit.
"""

from typing import Any

import keras
import tensorflow as tf

_Gradient = tf.Tensor | tf.IndexedSlices


def update(optimizer: keras.optimizers.Optimizer, gradient: _Gradient, variable: tf.Variable) -> bool:
    """Move `variable` and its slots as `optimizer.update_step` would, and return True; False leaves all as it is.

    Replica context; the gradient is reduced. There are kernels for SGD, with and without momentum, Adam and AdamW
    (whose decay comes before), but none for AMSGrad, for a sparse gradient of plain SGD, and for what a user derives.
    Other dtypes than float32 stay Keras's: GPUs have no kernel for bfloat16, and 1 - beta_2 would be 0 in it.
    """
    kind = type(optimizer)
    if variable.dtype != tf.float32:
        return False
    if kind is keras.optimizers.SGD and optimizer.momentum == 0:
        if isinstance(gradient, tf.IndexedSlices):
            return False  # Keras moves its rows only
        _descend(optimizer, gradient, variable)
    elif kind is keras.optimizers.SGD:
        _descend_with_momentum(optimizer, gradient, variable)
    elif kind in (keras.optimizers.Adam, keras.optimizers.AdamW) and not optimizer.amsgrad:
        _adam(optimizer, gradient, variable)
    else:
        return False
    return True


def _descend(optimizer: Any, gradient: tf.Tensor, variable: tf.Variable) -> None:
    rate, delta = _as(variable, optimizer.learning_rate), _as(variable, gradient)
    tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=rate, delta=delta)


def _descend_with_momentum(optimizer: Any, gradient: _Gradient, variable: tf.Variable) -> None:
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=_slot(optimizer, optimizer.momentums, variable),
        lr=_as(variable, optimizer.learning_rate),
        grad=_as(variable, gradient),
        momentum=_as(variable, optimizer.momentum),
        use_nesterov=optimizer.nesterov,
    )


def _adam(optimizer: Any, gradient: _Gradient, variable: tf.Variable) -> None:
    betas = [_as(variable, beta) for beta in (optimizer.beta_1, optimizer.beta_2)]
    powers = [tf.pow(beta, _as(variable, optimizer.iterations + 1)) for beta in betas]
    larger = _as(variable, _second_moment_over_keras(optimizer))
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=_slot(optimizer, optimizer._momentums, variable),
        v=_slot(optimizer, optimizer._velocities, variable),
        beta1_power=powers[0],
        beta2_power=powers[1],
        lr=larger * _as(variable, optimizer.learning_rate),
        beta1=betas[0],
        beta2=betas[1],
        epsilon=larger * _as(variable, optimizer.epsilon),
        grad=_as(variable, gradient),
    )


def _second_moment_over_keras(optimizer: Any) -> tf.Tensor:
    """Return the factor, float64, by which the root of the kernel's second moment is larger than that of Keras.

    The kernel takes 1 - beta_2 of beta_2 in float32, 5e-5 too large for 0.999; Keras takes it before it rounds.
    Of a gradient that stays the same the moment is then 1 - beta_2^t, of each; later steps forget the difference.
    """
    exact = tf.constant(optimizer.beta_2, tf.float64)
    rounded = tf.cast(tf.constant(optimizer.beta_2, tf.float32), tf.float64)
    step = tf.cast(optimizer.iterations + 1, tf.float64)
    return tf.sqrt((1 - tf.pow(rounded, step)) / (1 - tf.pow(exact, step)))


def _slot(optimizer: Any, slots: list[Any], variable: tf.Variable) -> tf.Tensor:
    return slots[optimizer._get_variable_index(variable)].value.handle


def _as(variable: tf.Variable, value: Any) -> tf.Tensor:
    # Slots move everywhere, also where a sparse gradient has no row: so it does in Keras.
    return tf.cast(tf.convert_to_tensor(value), variable.dtype)
