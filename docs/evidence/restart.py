"""How long a killed run takes from its command to its next step: python docs/evidence/restart.py mnist_cnn 7.

Arguments: a task and how often. The run is killed by SIGKILL behind a checkpoint and started again by the same command;
the time ends when the log has the metrics of a step that the killed run had not done, up to five steps later.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = ("--train_steps=100000", "--steps_per_call=1", "--checkpoint_every_steps=5")


def start(task: str, workdir: Path) -> subprocess.Popen[bytes]:
    """Start the run."""
    command = [sys.executable, "-m", "launch.train", f"--task={task}", *FLAGS, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steps(workdir: Path) -> int:
    """Return how many lines the log of the steps has."""
    log = workdir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def until(process: subprocess.Popen[bytes], workdir: Path, lines: int) -> None:
    """Wait until the log has so many lines. Raises RuntimeError if the run ends before."""
    while steps(workdir) < lines:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode}")
        time.sleep(0.005)


def main(task: str, times: str) -> None:
    """Kill and start again so often; print the seconds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        lines = 40
        for launch in range(1 + int(times)):
            began = time.perf_counter()
            process = start(task, workdir)
            until(process, workdir, steps(workdir) + 1)
            if launch:
                found.append(time.perf_counter() - began)
            until(process, workdir, lines)
            process.kill()
            process.wait()
            lines = steps(workdir) + 40
    print(f"{task}: {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f}), {times} times")


if __name__ == "__main__":
    main(*sys.argv[1:])
