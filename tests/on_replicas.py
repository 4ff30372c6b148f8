"""Run a step that returns metrics on each replica of a strategy, without the data pipeline, and compute all of them."""

import numpy as np
import tensorflow as tf

from distloop import metrics


def values_on_each_replica(strategy, step, batches):
    """Share each global batch (a dict of arrays) over the replicas, sum over the batches; return floats by replica."""
    count, found = strategy.num_replicas_in_sync, {}

    def run(batch):
        mine = metrics.check(step(batch))  # not `found`: the replicas take turns at each reduction
        found.update(mine)
        summed = {name: metric for name, metric in mine.items() if not metric.gathered}
        packed, _ = metrics.reduce_and_pack(summed, tf.zeros([1]), None)
        return packed, metrics.pack_gathered(mine)

    def share(batch):
        def part(context):
            size = len(batch["weight"]) // count
            begin = context.replica_id_in_sync_group * size
            return {name: tf.constant(value[begin : begin + size]) for name, value in batch.items()}

        return strategy.experimental_distribute_values_from_function(part)

    compiled = tf.function(lambda shared: strategy.run(run, args=(shared,)), autograph=False)
    calls = [[strategy.experimental_local_results(value) for value in compiled(share(batch))] for batch in batches]
    return [
        metrics.results(
            found,
            np.sum([packed[replica].numpy().astype(np.float64) for packed, _ in calls], axis=0),
            np.concatenate([gathered[replica].numpy() for _, gathered in calls]),
        )
        for replica in range(count)
    ]
