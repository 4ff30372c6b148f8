"""Write the table of docs/design.md: how far replicas drift from one device, by seed. About 5 minutes on two cores.

    python docs/evidence/equal_by_seed.py

Each number of replicas gets its own process, because logical devices cannot be changed once TensorFlow has started.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STEPS, BATCH, SEEDS = 50, 64, range(8)


def train(replicas: int, out: str) -> None:
    """Train every seed on `replicas` logical CPUs; save final weights and each step's totals and counts."""
    import keras

    from distloop import RunConfig, runtime, strategies
    from distloop.checkpoint import named_variables
    from distloop.cluster import Cluster
    from distloop.data import make_stream, per_replica_batches
    from distloop.steps import compile_steps
    from distloop.task import load_task

    runtime.initialize(replicas=replicas, seed=0)
    name = "mirrored" if replicas > 1 else "default"
    strategy = strategies.make_strategy(name, cluster=Cluster(), replicas=replicas)
    found = {}
    for seed in SEEDS:
        keras.utils.clear_session()
        keras.utils.set_random_seed(seed)
        task = load_task("mnist_cnn", RunConfig(seed=seed))
        with strategy.scope():
            state = task.build()
        stream = make_stream(task.train_data(), name="train_data", global_batch_size=BATCH, seed=seed)
        batches = strategy.distribute_datasets_from_function(
            lambda context, stream=stream: per_replica_batches(stream, context, first_step=0)
        )
        rows = compile_steps(strategy, task.train_step, state, batches, training=True)(STEPS).astype(np.float64)
        found[f"loss {seed}"] = rows[:, 0, 0] / rows[:, 0, 1]
        weights = [v.numpy().ravel() for n, v in named_variables(state).items() if n.startswith("model/")]
        found[f"weights {seed}"] = np.concatenate(weights).astype(np.float64)
    np.savez(out, **found)


def main() -> None:
    """Run 1, 2 and 4 replicas and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for replicas in (1, 2, 4):
            out = Path(folder) / f"{replicas}.npz"
            subprocess.run([sys.executable, __file__, str(replicas), out], check=True, stderr=subprocess.DEVNULL)
            found[replicas] = dict(np.load(out))
    print("| seed | mirrored 2: weights | loss | mirrored 4: weights | loss |\n| --- | --- | --- | --- | --- |")
    for seed in SEEDS:
        cells = []
        for replicas in (2, 4):
            ours, one = found[replicas], found[1]
            apart = np.linalg.norm(ours[f"weights {seed}"] - one[f"weights {seed}"])
            cells.append(apart / np.linalg.norm(one[f"weights {seed}"]))
            cells.append(np.abs(ours[f"loss {seed}"] - one[f"loss {seed}"]).max())
        print(f"| {seed} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
