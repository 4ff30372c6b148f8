"""One step over a given global batch, for tests that look at a step from close by."""

import numpy as np
import tensorflow as tf


def _distributed(strategy, batch):
    """Share a global batch of arrays out over the replicas, in order; add the weight 1."""
    size = len(next(iter(batch.values())))
    batch = {"weight": np.ones(size, np.float32), **batch}
    local = size // strategy.num_replicas_in_sync

    def share(context):
        begin = context.replica_id_in_sync_group * local
        return {name: tf.constant(value[begin : begin + local]) for name, value in batch.items()}

    return strategy.experimental_distribute_values_from_function(share)


def _compiled(strategy, step):
    def parts(batch):
        return {name: metric.parts for name, metric in step(batch).items()}

    return tf.function(lambda batch: strategy.run(parts, args=(batch,)), autograph=False)


def run_step(strategy, step, batch):
    """Run `step(batch)` once on every replica; return each one's metrics, {name: [parts]}."""
    out = _compiled(strategy, step)(_distributed(strategy, batch))
    replicas = range(len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1)
    return [
        {
            name: [strategy.experimental_local_results(part)[replica].numpy() for part in parts]
            for name, parts in out.items()
        }
        for replica in replicas
    ]


def collectives(strategy, step, batch):
    """Return the collective operations of the compiled step, over all local replicas."""
    traced = _compiled(strategy, step).get_concrete_function(_distributed(strategy, batch))
    graph = traced.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return [node.op for node in nodes if "Collective" in node.op or "Nccl" in node.op]
