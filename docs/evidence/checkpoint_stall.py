"""Measure how long a save stalls the training and its write takes: python docs/evidence/checkpoint_stall.py FOLDER."""

import sys
import tempfile

import keras
import tensorflow as tf
from etils import epath

from distloop import State
from distloop.checkpoint import Checkpointer

REPEATS = 5


def measure(megabytes: int, folder: str) -> tuple[float, float]:
    """Return the median stall and write in seconds of checkpoints of so many MB in 20 variables."""
    weights = {f"w{i}": tf.Variable(tf.random.normal([megabytes * 12_500])) for i in range(20)}
    state = State(**weights, seed=keras.random.SeedGenerator(0))
    found = []
    with (
        tempfile.TemporaryDirectory(dir=folder) as parent,
        Checkpointer(epath.Path(parent), state, writes=True) as saver,
    ):
        for step in range(REPEATS + 1):
            state.step.assign(step)
            saver.save({})
            saver.wait()
            timings = saver.timings()
            found.append((timings["checkpoint_stall_seconds"], timings["checkpoint_write_seconds"]))
    stalls, writes = zip(*found[1:], strict=True)
    return sorted(stalls)[REPEATS // 2], sorted(writes)[REPEATS // 2]


if __name__ == "__main__":
    print("| checkpoint | stall of the step | write in the background |\n| --- | --- | --- |")
    for size in (1, 10, 100, 1000):
        stall, write = measure(size, sys.argv[1])
        print(f"| {size} MB | {stall * 1e3:.1f} ms | {write:.2f} s |")
