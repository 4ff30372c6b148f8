"""The loss scale by itself: when it grows, shrinks and stays."""

import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig
from distloop.errors import UsageError
from distloop.precision import LossScale, Scaling, all_finite


def scales(strategy, scaling, finite):
    """Return the scale after each step, on each replica."""
    with strategy.scope():
        loss_scale = LossScale(scaling)
    found = []
    for value in finite:
        tf.function(lambda value=value: strategy.run(loss_scale.update, args=(tf.constant(value),)))()
        found.append([float(v) for v in strategy.experimental_local_results(loss_scale.scale)])
    assert all(len(set(step)) == 1 for step in found)
    return [step[0] for step in found], loss_scale


def test_the_scale_grows_after_steps_in_a_row_without_overflow(strategy):
    scaling = Scaling(8.0, growth_steps=3, growth_factor=2.0, backoff_factor=0.5, floor=1.0)
    found, _ = scales(strategy, scaling, [True, True, False, True, True, True, True, True, True])
    assert found == [8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_the_scale_shrinks_to_its_floor_and_counts_skipped_steps(strategy):
    scaling = Scaling(8.0, growth_steps=100, growth_factor=3.0, backoff_factor=0.25, floor=1.5)
    found, loss_scale = scales(strategy, scaling, [False, False, False, True])
    assert found == [2, 1.5, 1.5, 1.5]
    assert int(loss_scale.skipped.numpy()) == 3


def test_the_scale_never_grows_to_infinity(strategy):
    scaling = Scaling(3e38, growth_steps=1, growth_factor=2.0, backoff_factor=0.5, floor=1.0)
    found, _ = scales(strategy, scaling, [True])
    assert found == [np.float32(3e38)]


def test_a_static_scale_stays(strategy):
    scaling = Scaling(64.0, growth_steps=2**62, growth_factor=1.0, backoff_factor=1.0, floor=0.0)
    assert scales(strategy, scaling, [True, False, False, True])[0] == [64.0] * 4


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_entry_that_is_not_finite_is_seen_in_dense_and_sparse_gradients(bad):
    good, dense = tf.ones([2, 2]), tf.constant([1.0, bad])
    sparse = tf.IndexedSlices(tf.constant([[1.0], [bad]]), tf.constant([0, 1]), tf.constant([4, 1]))
    assert bool(all_finite([good, tf.IndexedSlices(good, tf.constant([0, 1]), tf.constant([4, 2]))]))
    assert not bool(all_finite([good, dense]))
    assert not bool(all_finite([sparse, good]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(precision="float16"), "precision is 'float16'; expected one of float32, mixed_bfloat16, mixed_float16"),
        (dict(loss_scale=128.0), "loss_scale is 128.0, but precision is float32, whose gradients need none"),
        (dict(loss_scale_backoff_factor=1.0), "expected a growth factor above 1 and a backoff factor from 0 to 1"),
        (dict(min_loss_scale=2.0**20), "expected a minimum above 0 and at most the initial one"),
        (dict(loss_scale_growth_steps=0), "loss_scale_growth_steps is 0; expected a whole number of at least 1"),
        (dict(clip_global_norm=0.0), "clip_global_norm is 0.0; expected a number above 0"),
        (dict(micro_batches=0), "micro_batches is 0; expected a whole number"),
        (dict(bytes_per_pack=-1), "bytes_per_pack is -1; expected a whole number of bytes, such as 4000000, or 0"),
        (dict(jit_compile="maybe"), "jit_compile is 'maybe'; expected True, False or auto"),
        (dict(wire_dtype="int8"), "wire_dtype is 'int8'; expected one of float32, bfloat16, float16"),
        (dict(ema_momentum=1.0), "ema_momentum is 1.0; expected a number from 0 to below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, sentence):
    with pytest.raises(UsageError) as refusal:
        RunConfig(**settings)
    assert sentence in str(refusal.value)
