"""Train by `distloop.train` and write what every local replica holds: python -m tests.dump_replicas OUT CONFIG_JSON."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from distloop import RunConfig, train
from distloop.cluster import from_tf_config
from distloop.sharding import ShardedSlot
from distloop.task import load_task, named_variables


def on_local_replicas(variable):
    """Return what each replica of this process holds of a variable; of a slot that is shared out, the whole."""
    if isinstance(variable, ShardedSlot):
        return [variable.numpy()] * len(variable.local_pieces)
    return [tf.convert_to_tensor(local).numpy() for local in getattr(variable, "values", [variable])]


def main() -> None:
    out, config = sys.argv[1], RunConfig(**json.loads(sys.argv[2]))
    task = load_task(config.task, config)
    state = None
    traced = {"train": 0, "eval": 0}

    def build():
        nonlocal state
        state = task.build()
        return state

    def counted(name, step):
        def count_and_call(*arguments):
            traced[name] += 1
            return step(*arguments)

        return count_and_call

    watched = dataclasses.replace(
        task,
        build=build,
        train_step=counted("train", task.train_step),
        eval_step=counted("eval", task.eval_step),
    )
    summary = train(watched, config)
    arrays = {}
    for name, variable in named_variables(state).items():
        for replica, value in enumerate(on_local_replicas(variable)):
            arrays[f"{replica}:{name}"] = value
    worker = from_tf_config(os.environ.get("TF_CONFIG")).index
    np.savez(f"{out}.worker{worker}.npz", **arrays)
    facts = {"summary": summary, "traced": traced, "replicas": len({name.split(":")[0] for name in arrays})}
    Path(f"{out}.worker{worker}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
