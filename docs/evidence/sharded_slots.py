"""Measure what sharded slots save on two processes of 51 million weights: python docs/evidence/sharded_slots.py."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from distloop import RunConfig, State, Task, minimize, train

LAYERS, WIDTH, BATCH, STEPS, LAUNCHES = 20, 1600, 32, 8, 1


def task_of(states: list[State]) -> Task:
    """Return layers that fit a constant by Adam; `states` gets their state."""

    def build() -> State:
        layers = [keras.layers.Dense(WIDTH, activation="tanh") for _ in range(LAYERS)]
        states.append(State(model=keras.Sequential([keras.Input([WIDTH]), *layers]), optimizer=keras.optimizers.Adam()))
        return states[0]

    def train_step(state: State, batch: dict[str, tf.Tensor]):
        return minimize(
            lambda b: tf.reduce_mean(tf.square(state.model(b["x"])), axis=1),
            batch,
            state.optimizer,
            state.model.trainable_variables,
        )

    return Task(build, train_step, lambda: {"x": np.ones([BATCH, WIDTH], np.float32)})


def slot_bytes(state: State) -> int:
    """Return the bytes of the slots that one replica holds."""
    return sum(tf.size(variable.value).numpy() * 4 for variable in state.optimizer.variables if variable.ndim)


def memory(line: str) -> float:
    """Return resident memory in MB: `VmRSS` now, `VmHWM` at its peak."""
    (found,) = [text.split()[1] for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line)]
    return int(found) / 1e3


def work(folder: str, sharded: bool) -> None:
    """Train in one worker and print a line."""
    states, times, peaks = [], [], []

    def look(progress):
        times.append(time.perf_counter())
        peaks.append((memory("VmRSS"), memory("VmHWM")))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    config = RunConfig(
        workdir=folder, global_batch_size=BATCH, train_steps=STEPS, steps_per_call=1, shard_optimizer=sharded
    )
    train(task_of(states), config, extra_actions=[look])
    step, (now, peak) = np.median(np.diff(times[2:])), np.median(peaks[2:], axis=0)
    print(
        f"RESULT {slot_bytes(states[0]) / 1e6:.1f} {now:.0f} {peak:.0f} {step * 1e3:.0f} {memory('VmHWM'):.0f}",
        flush=True,
    )


def main() -> None:
    """Measure in turn, or be one of the workers."""
    if len(sys.argv) > 1:
        return work(sys.argv[1], sys.argv[2] == "True")
    found = {False: [], True: []}
    for sharded in (False, True) * LAUNCHES:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *("-m", "launch.run", "--workers=2", "--", sys.executable),
                __file__,
                f"{folder}/run",
                str(sharded),
            ]
            said = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True).stdout
        found[sharded].extend(
            [float(n) for n in line.split("RESULT ")[1].split()] for line in said.splitlines() if "RESULT " in line
        )
    print("| | slots of a replica | memory of a process between steps | its peak in a step | step | peak in a save |")
    print("| --- | --- | --- | --- | --- | --- |")
    for sharded, rows in found.items():
        slots, now, peak, step, save = np.median(rows, axis=0)
        name = "sharded" if sharded else "whole"
        print(f"| {name} | {slots:.1f} MB | {now:.0f} MB | {peak:.0f} MB | {step:.0f} ms | {save:.0f} MB |")


if __name__ == "__main__":
    main()
