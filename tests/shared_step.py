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
    return run_steps(strategy, step, [batch])


def run_steps(strategy, step, batches):
    """Run `step(batch)` for each batch, traced once; return what `run_step` does, of the last."""
    compiled = _compiled(strategy, step)
    *_, out = [compiled(_distributed(strategy, batch)) for batch in batches]
    replicas = range(len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1)
    return [
        {
            name: [strategy.experimental_local_results(part)[replica].numpy() for part in parts]
            for name, parts in out.items()
        }
        for replica in replicas
    ]


def exchanges(strategy, step, batch):
    """Return the operations of the compiled step that meet several replicas: collectives, or one process's own sums."""
    return exchanges_of(_compiled(strategy, step), _distributed(strategy, batch))


def exchanges_of(function, *arguments):
    """Return the operations of a `tf.function` that meet several replicas."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [n.op for n in nodes if "Collective" in n.op or "Nccl" in n.op or "sum_of_replicas" in n.name.split("/")[-1]]
