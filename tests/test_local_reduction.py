"""The sum in the memory of one process: right, and the same bits on every replica."""

import numpy as np
import tensorflow as tf

from distloop import local_reduction
from distloop.reduction import all_reduce_sum

LARGE = 2**14 + 3


def test_values_of_all_kinds_are_summed_alike_on_every_replica(mirrored):
    def values(replica):
        share = tf.cast(replica + 1, tf.float32)
        return {
            "scalar": share,
            "none": tf.zeros([0]),
            "matrix": share * tf.reshape(tf.range(6.0), [2, 3]),
            "large": share * tf.sin(tf.range(float(LARGE))),
            "exact": tf.cast(replica, tf.float64) + 2.0**40,
            "rows": tf.IndexedSlices(share * tf.ones([2, 2]), tf.stack([0, replica]), tf.constant([3, 2])),
        }

    def run():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return {k: tf.identity(tf.convert_to_tensor(v)) for k, v in all_reduce_sum(values(replica)).items()}

    assert local_reduction.fits(mirrored)
    found = tf.function(lambda: mirrored.run(run), autograph=False)()
    first, second = ({k: mirrored.experimental_local_results(v)[i].numpy() for k, v in found.items()} for i in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert {k: first[k] for k in ("scalar", "exact")} == {"scalar": 3, "exact": 2.0**41 + 1}
    assert first["none"].shape == (0,)
    np.testing.assert_array_equal(first["matrix"], 3 * np.arange(6).reshape(2, 3))
    np.testing.assert_allclose(first["large"], 3 * np.sin(np.arange(LARGE)), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(first["rows"], [[4, 4], [2, 2], [0, 0]])


def test_one_replica_sums_nothing():
    assert not local_reduction.fits(tf.distribute.get_strategy())
