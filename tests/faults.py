"""Kill the workers of a run again and again, start the same command each time, and compare with a run left alone.

python -m tests.faults --kills=200 --seed=0     prints a line a kill, and what differs in the end: nothing

A kill is a SIGKILL: from outside, at a moment by the clock or some time after a step was logged, or by the process
itself at a moment that only it can know (`tests.dying`). A run has one process or two, and an attempt is all processes
of it from their start to the first death, when the others are killed, as a supervisor would.
"""

import argparse
import itertools
import os
import re
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import dying, harness
from tests.run_files import checkpoints, complete, differences, digest, last_logged, saved_steps

STEPS, SAVE_EVERY, EVAL_EVERY = 60, 6, 5
LIMIT_SECS = 120  # for an attempt


@dataclass(frozen=True)
class Run:
    """Say what runs: `flags` and the folder are those of the command."""

    folder: Path
    workers: int = 1
    task: str = "everything"
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Return the arguments of `python`, the same for every attempt."""
        mixed = ("--precision=mixed_float16", "--initial_loss_scale=131072", "--loss_scale_growth_steps=5")
        return [
            *("-m", "distloop", f"--task=tests.dying:{self.task}", f"--workdir={self.folder}", "--ema_momentum=0.9"),
            *(f"--global_batch_size={dying.BATCH}", f"--train_steps={STEPS}", f"--steps_per_call={self.workers}"),
            *(f"--checkpoint_every_steps={SAVE_EVERY}", f"--eval_every_steps={EVAL_EVERY}"),
            *(mixed if self.task == "everything" else ()),
            *self.flags,
        ]


@dataclass(frozen=True)
class Kill:
    """Say who dies and when: a moment of `tests.dying` with its number, or one of these, from outside.

    `clock` is `delay` seconds after the start; `logged:N` as long after the N-th step of the attempt is logged;
    `loading` as long after TensorFlow's library is there, in processes that import it themselves.
    """

    moment: str
    ranks: tuple[int, ...] = (0,)
    delay: float = 0.0

    @property
    def outside(self) -> bool:
        """Return whether the signal comes from another process."""
        return self.moment.partition(":")[0] in ("clock", "logged", "loading")

    def __str__(self) -> str:
        late = f" + {self.delay * 1000:.0f} ms" if self.outside else ""
        return f"rank {' and '.join(map(str, self.ranks))} at {self.moment}{late}"


class Attempt(NamedTuple):
    """Say how an attempt went. `resumed` is None if it ended before it said so; `codes` by rank."""

    codes: list[int]
    resumed: int | None
    logged: int  # the last step in metrics.jsonl
    saved: int  # the newest complete checkpoint, 0 if there is none
    doing: str  # what it left behind: set-up, steps, save, end
    errors: str

    @property
    def killed(self) -> bool:
        """Return whether a worker was killed."""
        return -signal.SIGKILL in self.codes


def attempt(run: Run, kill: Kill | None) -> Attempt:
    """Start all workers, let them run to their ends or to the kill, and leave none."""
    before, torn = saved_steps(run.folder)[-1], _incomplete(run.folder)
    die = {} if kill is None or kill.outside else _planned(kill)
    fresh = kill is not None and kill.moment == "loading"
    processes = harness.start_workers(run.command, workers=run.workers, fresh=fresh, **die)
    end = time.monotonic() + LIMIT_SECS
    try:
        if kill is not None and kill.outside:
            _wait_for(kill, run, processes, before)
            for rank in kill.ranks:
                with suppress(ProcessLookupError):
                    os.kill(processes[rank].pid, signal.SIGKILL)
        running = list(processes)
        while running:
            ended, _, _ = select.select(running, [], [], max(end - time.monotonic(), 0))
            assert ended, f"attempt {kill} hangs: {[process.output() for process in processes]}"
            running = [process for process in running if process not in ended]
            if any(process.poll() for process in ended):
                break
    finally:
        for process in processes:
            if process.poll() is None:
                harness.kill(process)
    out = processes[0].output()[0]
    started = re.search(r"total steps +\d+(?:, resumed after (\d+))?", out)
    logged, saved = last_logged(run.folder), saved_steps(run.folder)[-1]
    doing = "set-up" if started is None else "save" if _incomplete(run.folder) - torn else "steps"
    if doing == "steps" and logged == STEPS:
        doing = "end"
    codes = [process.wait(0) for process in processes]
    errors = "".join(process.output()[1] for process in processes)
    return Attempt(codes, started and int(started[1] or 0), logged, saved, doing, errors)


def _incomplete(folder: Path) -> set[tuple[Path, int]]:
    """Return the folders of checkpoints without an index, and when each last changed."""
    return {(path, path.stat().st_ctime_ns) for path in checkpoints(folder) if not complete(path)}


def _planned(kill: Kill) -> dict[str, str]:
    return {dying.DIES: kill.moment, dying.RANKS: ",".join(map(str, kill.ranks))}


def _wait_for(kill: Kill, run: Run, processes: list[harness.Process], before: int) -> None:
    """Return when the moment has come, or when a process has ended."""
    kind, _, number = kill.moment.partition(":")

    def has_come() -> bool:
        if kind == "loading":
            return all("libtensorflow_framework" in _libraries(processes[rank].pid) for rank in kill.ranks)
        if kind == "logged":  # what an earlier attempt logged later than its checkpoint is dropped before this is said
            return "total steps" in processes[0].output()[0] and last_logged(run.folder) >= before + int(number)
        return True

    def one_has_ended(secs: float = 0) -> bool:
        return bool(select.select(processes, [], [], secs)[0])

    harness.until(lambda: has_come() or one_has_ended(), limit_secs=LIMIT_SECS)
    one_has_ended(kill.delay)


def _libraries(pid: int) -> str:
    with suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/maps").read_text()
    return ""


def carry_through(run: Run, kills: Iterable[Kill]) -> Iterator[tuple[Kill | None, Attempt]]:
    """Yield an attempt for each kill until one is not in time, and then one that ends well.

    Checks of each attempt that it starts from the newest complete checkpoint, that it replays no more than the steps of
    one interval, and of a second one where a checkpoint was still being written, and that who dies, dies by SIGKILL.
    """
    for kill in itertools.chain(kills, [None]):
        logged, saved = last_logged(run.folder), saved_steps(run.folder)[-1]
        assert logged - saved <= 2 * SAVE_EVERY, f"{logged - saved} steps are replayed"
        found = attempt(run, kill)
        assert found.resumed in (None, saved), f"{kill}: resumed after {found.resumed}, not {saved}"
        assert found.killed or not any(found.codes), f"{kill}: {found.codes}\n{found.errors}"
        yield kill, found
        if not any(found.codes):
            return


def random_kills(random: np.random.Generator, *, workers: int, seconds: float) -> Iterator[Kill]:
    """Yield kills without end; `seconds` is about what an attempt without one takes."""
    everyone = tuple(range(workers))
    kinds = {"clock": 0.2, "logged": 0.4, "step": 0.1, "file": 0.1, "eval": 0.1, "set-up": 0.1}
    while True:
        kind = str(random.choice(list(kinds), p=list(kinds.values())))
        ranks = [(0,), (1,), everyone][random.integers(3)] if workers > 1 else everyone
        moments = {
            "clock": ("clock", random.uniform(0, seconds)),
            "logged": (f"logged:{random.integers(1, 12)}", random.uniform(0, 0.03)),
            "step": (f"{random.choice(['begin', 'end'])}:{random.integers(1, STEPS + 1)}", 0.0),
            "file": (f"{random.choice(['file', 'save'])}:{random.integers(1, 30)}", 0.0),
            "eval": (f"eval:{random.integers(1, 8)}", 0.0),
            "set-up": (str(random.choice(["import:1", "build:1", "built:1", "trace:1", "loading"])), 0.0),
        }
        moment, delay = moments[kind]
        if moment == "loading":
            delay = random.uniform(0, 1)
        yield Kill(moment, ranks, delay)


def clean(folder: Path, *, workers: int) -> tuple[Run, float]:
    """Train without a kill; return the run and how many seconds it took."""
    run = Run(folder, workers)
    began = time.monotonic()
    ((_, found),) = carry_through(run, [])
    assert not any(found.codes), found.errors
    assert not differences(folder, folder)
    return run, time.monotonic() - began


def kill_at_random(
    folder: Path, reference: Run, *, kills: int, seed: int, seconds: float, kills_a_run: int = 10
) -> Iterator[tuple[str, Attempt | None]]:
    """Kill runs of one command until `kills` kills have been in time; yield a line for each, and for each run's end.

    Raises AssertionError on the first difference from the reference.
    """
    random = np.random.default_rng(seed)
    plan = random_kills(random, workers=reference.workers, seconds=seconds)
    done = 0
    for number in itertools.count(1):
        run = Run(folder / f"run_{number}", reference.workers)
        for kill, found in carry_through(run, itertools.islice(plan, min(kills_a_run, kills - done))):
            if kill is not None and found.killed:
                done += 1
                yield (
                    (
                        f"kill {done:3}  {kill!s:32} was at {found.doing:6}  start after {_show(found.resumed)}  "
                        f"logged {found.logged:2}  whole checkpoint {found.saved:2}"
                    ),
                    found,
                )
        differ = differences(run.folder, reference.folder)
        assert not differ, f"{run.folder}: {differ}"
        yield f"run {number}: ended at {last_logged(run.folder)}, all variables {digest(run.folder)}", None
        if done == kills:
            return


def _show(step: int | None) -> str:
    return " -" if step is None else f"{step:2}"


def _main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs of one and of two processes at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    harness.run("-c", "pass")  # the imports that all share
    print(
        *(f"{name} {metadata.version(name)}" for name in ("tensorflow", "keras")), f"{os.cpu_count()} cores", sep=", "
    )
    killed: list[Attempt] = []
    with tempfile.TemporaryDirectory() as folder:
        for workers, kills in ((1, options.kills // 2), (2, options.kills - options.kills // 2)):
            reference, seconds = clean(Path(folder) / f"clean_{workers}", workers=workers)
            print(
                f"\n{workers} process(es), no kill: all variables {digest(reference.folder)}, {seconds:.1f} s",
                flush=True,
            )
            lines = kill_at_random(
                Path(folder) / f"killed_{workers}", reference, kills=kills, seed=options.seed + workers, seconds=seconds
            )
            for line, found in lines:
                print(line, flush=True)
                killed += [found] if found else []
    when = Counter(found.doing for found in killed)
    print("\nkilled", ", ".join(f"{count} at {doing}" for doing, count in when.items()))
    replayed = max(found.logged - found.saved for found in killed)
    print(f"at most {replayed} logged steps were replayed; a checkpoint is saved every {SAVE_EVERY}")
    print(f"{len(killed)} kills, 0 differences, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    _main()
