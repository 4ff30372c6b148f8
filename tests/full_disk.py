"""Fill a real disk, a small tmpfs in a namespace of its own: unshare -rm python -m tests.full_disk EMPTY_FOLDER."""

import subprocess
import sys

import tensorflow as tf
from etils import epath

from distloop import RunConfig, State, UsageError, workdir
from distloop.checkpoint import Checkpointer


def mount(*options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1], "-o", ",".join(options)], check=True)


def main() -> None:
    mount("size=1M")
    state = State(weights=tf.Variable(tf.zeros([100_000])))
    checkpointer = Checkpointer(epath.Path(sys.argv[1]) / "checkpoints", state, writes=True)
    for step in range(3):  # the third does not fit
        state.step.assign(step)
        checkpointer.save({"step": step})
    checkpointer.save({"step": 2})  # waits; fails again, and raises nothing
    print(checkpointer.restore())
    mount("remount", "size=2M")
    state.step.assign(3)
    checkpointer.save({"step": 3})
    checkpointer.wait()
    print(checkpointer.restore())
    mount("remount", "ro")
    try:
        workdir.check(RunConfig(workdir=sys.argv[1] + "/run"))
    except UsageError as error:
        print(error)


if __name__ == "__main__":
    main()
