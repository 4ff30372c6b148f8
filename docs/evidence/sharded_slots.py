"""Measure what sharded slots save on two processes with 51 million weights: python docs/evidence/sharded_slots.py."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, WIDTH, BATCH, STEPS, LAUNCHES = 20, 1600, 32, 10, 3
WARM_UP = 3


def work(folder: str, *, sharded: bool) -> None:
    """Train by Adam in one worker and print a line of figures."""
    import keras
    import numpy as np
    import tensorflow as tf

    from distloop import RunConfig, State, Task, minimize, train

    states, times, resident = [], [], []

    def build() -> State:
        layers = [keras.layers.Dense(WIDTH, activation="tanh") for _ in range(LAYERS)]
        states.append(State(model=keras.Sequential([keras.Input([WIDTH]), *layers]), optimizer=keras.optimizers.Adam()))
        return states[0]

    def train_step(state: State, batch: dict[str, tf.Tensor]):
        def loss(b):
            return tf.reduce_mean(tf.square(state.model(b["x"])), axis=1)

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def look(_):
        times.append(time.perf_counter())
        resident.append([_memory("VmRSS"), _memory("VmHWM")])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    settings = dict(global_batch_size=BATCH, train_steps=STEPS, steps_per_call=1, shard_optimizer=sharded)
    data = {"x": np.ones([BATCH * STEPS, WIDTH], np.float32)}
    train(Task(build, train_step, lambda: data), RunConfig(workdir=folder, **settings), extra_actions=[look])
    slots = sum(v.value.shape.num_elements() * 4 for v in states[0].optimizer.variables if v.ndim) / 1e6
    now, peak = np.median(resident[WARM_UP:], axis=0)
    figures = slots, now, peak, _memory("VmHWM"), 1e3 * np.median(np.diff(times[WARM_UP:]))
    print("FIGURES", *(f"{figure:.0f}" for figure in figures), flush=True)


def _memory(line: str) -> float:
    """Return resident memory in MB: `VmRSS` now, `VmHWM` at its peak."""
    (found,) = [text.split()[1] for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line)]
    return int(found) / 1e3


def launch(*, sharded: bool) -> list[list[float]]:
    """Return the figures of both workers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"{folder}/run", *(["sharded"] if sharded else [])]
        launcher = [sys.executable, "-m", "launch.run", "--workers=2", f"--logs_dir={folder}/logs", "--"]
        subprocess.run([*launcher, *command], stdout=subprocess.DEVNULL, check=True)
        said = [line for path in Path(folder).rglob("attempt_0.log") for line in path.read_text().splitlines()]
    return [[float(n) for n in line.split("FIGURES ")[1].split()] for line in said if "FIGURES " in line]


def main() -> None:
    """Launch both kinds in turns and print their medians."""
    if len(sys.argv) > 1:
        return work(sys.argv[1], sharded=len(sys.argv) > 2)
    found = {"whole": [], "sharded": []}
    for kind in (*found,) * LAUNCHES:
        found[kind].extend(launch(sharded=kind == "sharded"))
    print("| | slots of a replica | a process between steps | its peak in a step | its peak in a save | a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, rows in found.items():
        *megabytes, step = (sorted(column)[len(rows) // 2] for column in zip(*rows, strict=True))
        print(f"| {kind} | {' | '.join(f'{value:,.0f} MB' for value in megabytes)} | {step:,.0f} ms |")


if __name__ == "__main__":
    main()
