"""What the supervisor costs: its start, its memory, its time, and how fast it ends a group. F19 of the fault matrix.

python docs/evidence/launcher_cost.py

Starts are interleaved with those of the bare program, and medians come with quartiles.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "launch.run"]
PROGRAM = "from tests.worker_program import *; "
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def seconds(command: list[str]) -> float:
    """Return how long a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT)
    return time.perf_counter() - began


def show(name: str, values: list[float], unit: str) -> None:
    """Print a median with its quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{name:44}{middle:8.3g} {unit}   (quartiles {low:.3g} to {high:.3g}, {len(values)} runs)")


def start_cost() -> None:
    """Compare `true` under the supervisor with `true`, and with the least that Python takes."""
    python = [sys.executable, "-c", "pass"]
    rows = [(seconds([*RUN, "--", "true"]), seconds(["true"]), seconds(python)) for _ in range(40)]
    show("start and end of a run, added to the command's", [1000 * (ours - bare) for ours, bare, _ in rows], "ms")
    show("of which an empty Python takes", [1000 * (python - bare) for _, bare, python in rows], "ms")


def memory_and_time(seconds: float, *, steps_a_line: int) -> None:
    """Watch two workers that make 200 steps a second and write a line now and then."""
    program = (
        "tell('compile', 0); step = 0; tell('step', 0)\n"
        "while not beacon.stop_asked:\n"
        f"    step += 1; tell('step', step); step % {steps_a_line} or print('step', step); time.sleep(.005)\n"
        "tell('end', step)"
    )
    process = subprocess.Popen(
        [*RUN, "--workers=2", "--console=all", "--", sys.executable, "-c", PROGRAM + program],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    time.sleep(3)
    before = cpu_seconds(process.pid)
    time.sleep(seconds)
    share = (cpu_seconds(process.pid) - before) / seconds
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak, private = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1000 for name in ("VmHWM", "RssAnon"))
    process.send_signal(signal.SIGTERM)
    process.wait()
    print(f"{'memory: peak resident, and its own part':44}{peak:8.3g} MB, {private:.3g} MB")
    what = f"time of one core, {400 // steps_a_line} lines a second"
    print(f"{what:44}{100 * share:8.2g} %")


def cpu_seconds(pid: int) -> float:
    """Return the time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_time() -> None:
    """Let one of four workers die and take the time until the supervisor has ended all and itself."""
    program = "tell('compile', 0); meet('ready'); rank or (print(time.time(), flush=True), os._exit(3)); forever()"
    times = []
    for _ in range(10):
        folder = Path(os.popen("mktemp -d").read().strip())
        subprocess.run(
            [*RUN, "--workers=4", "--max_restarts=0", "--", sys.executable, "-c", PROGRAM + program],
            env=ENVIRONMENT,
            cwd=folder,
            capture_output=True,
        )
        died = float((folder / "distloop_logs/rank_0/attempt_0.log").read_text())
        times.append(time.time() - died)
    show("from the first death to the end of all", times, "s")


if __name__ == "__main__":
    os.chdir(os.popen("mktemp -d").read().strip())
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    start_cost()
    for steps_a_line in (200, 1):
        memory_and_time(20, steps_a_line=steps_a_line)
    kill_time()
