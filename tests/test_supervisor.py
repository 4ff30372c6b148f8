"""The supervisor, with small programs as workers: what they write, how they end, and that none is left."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from distloop.launcher.processes import free_ports
from tests import harness
from tests.harness import until

PROGRAM = "from tests.worker_program import *; "


def command(program, *, workers=2, flags=()):
    return harness.supervised("-c", PROGRAM + program, workers=workers, flags=flags)


def start(program, tmp_path, *, workers=2, flags=(), **environment):
    return harness.start(command(program, workers=workers, flags=flags), cwd=tmp_path, fresh=True, **environment)


def run(program, tmp_path, *, workers=2, flags=(), limit_secs=60, **environment):
    process = start(program, tmp_path, workers=workers, flags=flags, **environment)
    return harness.finish(process, limit_secs=limit_secs)


def until_ready(folder, *process):
    """Wait until both workers of a program have met at "ready"."""
    until(lambda: (folder / "ready.0").exists() and (folder / "ready.1").exists(), *process)


def processes_in(folder):
    """Return the processes that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").readlink() == folder:
                found.append(int(path.name))
        except OSError:  # it has just ended
            pass
    return found


def log(folder, rank, attempt=0):
    return (folder / f"distloop_logs/rank_{rank}/attempt_{attempt}.log").read_text()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    shared = set(Path("/dev/shm").iterdir())
    yield
    until(lambda: not processes_in(tmp_path), limit_secs=5)
    assert not list(tmp_path.rglob("*.tmp"))
    assert set(Path("/dev/shm").iterdir()) <= shared


def test_all_workers_end_well_and_each_has_its_place_in_the_cluster(tmp_path):
    code, out, err = run("print('hello from', rank, len(os.environ['TF_CONFIG']) > 0)", tmp_path, workers=3)
    assert (code, out, err) == (0, "[rank 0] hello from 0 True\n", "")
    assert [log(tmp_path, rank) for rank in range(3)] == [f"hello from {rank} True\n" for rank in range(3)]


@pytest.mark.parametrize(
    ("console", "shown"), [("chief", {0}), ("all", {0, 1}), ("errors", set())], ids=["chief", "all", "errors"]
)
def test_the_console_shows_whom_it_should_and_logs_have_all(tmp_path, console, shown):
    program = "print('a line'); print('to stderr', file=sys.stderr); print('no end', end='')"
    code, out, _ = run(program, tmp_path, flags=[f"--console={console}"])
    assert code == 0
    lines = [f"[rank {rank}] {text}" for rank in shown for text in ("a line", "to stderr", "no end")]
    assert sorted(out.splitlines()) == sorted(lines)
    assert log(tmp_path, 1) == "a line\nto stderr\nno end"


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_prefixes_are_coloured_on_a_terminal_unless_the_person_wants_none(tmp_path, environment, coloured):
    master, slave = pty.openpty()
    arguments = [sys.executable, *command("print('x')", flags=["--console=all"])]
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(
        arguments,
        cwd=tmp_path,
        env={**clean, "PYTHONPATH": str(harness.ROOT), **environment},
        stdout=slave,
        check=True,
        timeout=60,
    )
    os.close(slave)
    text = harness.read_terminal(master).decode()
    os.close(master)
    assert ("\x1b[36m[rank 0] \x1b[0mx" in text) == coloured
    assert ("[rank 1] x" in text) == (not coloured)


def run_in_terminal(program, tmp_path, *, flags=()):
    """Return the exit code of a supervisor of two workers, and what a person sees of its stdout."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 101, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
    arguments = [sys.executable, *command(program, flags=flags)]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=slave, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(slave)
    shown = harness.read_terminal(master)
    os.close(master)
    return process.wait(timeout=30), shown


def test_the_chief_has_a_terminal_where_the_supervisor_has_one_and_its_log_the_lines_that_stay(tmp_path):
    program = (
        "assert rank == 0 or not sys.stdout.isatty()\n"
        "if rank: sys.exit()\n"
        "print(sys.stdout.isatty(), os.get_terminal_size().columns)\n"
        "for part in range(50): print(f'\\r\\x1b[2K\\x1b[35m{part}%\\x1b[0m', end='', flush=True)\n"
        "print('\\r\\x1b[2Kdone')"
    )
    code, shown = run_in_terminal(program, tmp_path)
    assert code == 0
    assert shown.count(b"%") == 50
    assert shown.endswith(b"\x1b[2Kdone\r\n")
    assert log(tmp_path, 0) == "True 101\ndone\n"


@pytest.mark.parametrize(
    "ending", ["sys.exit(3)", "os.kill(os.getppid(), 2); time.sleep(.3); os.kill(os.getppid(), 2)"]
)
def test_what_the_chief_writes_once_all_is_over_is_for_its_log_and_the_cursor_is_there_again(tmp_path, ending):
    program = (
        "tell('compile', 0)\n"
        "if rank == 0: print('\\x1b[?25l50%', end='', flush=True); meet('shown'); forever()\n"
        f"meet('shown'); {ending}; forever()"
    )
    code, shown = run_in_terminal(program, tmp_path, flags=["--max_restarts=0"])
    assert code in (3, 130)
    assert shown == b"\x1b[?25l50%\x1b[0m\x1b[?25h"
    assert code == 130 or "in forever" in log(tmp_path, 0)


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    program = "[print('x' * 1000) for _ in range(1000)]; Path('whole').touch()"
    script = '"$@" | head -1; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, *command(program, workers=1)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "whole").exists()
    assert len(log(tmp_path, 0)) == 1001 * 1000


def test_a_terminal_that_is_closed_lets_the_workers_stop_with_a_checkpoint(tmp_path):
    program = (
        "tell('compile', 0); tell('step', 1); meet('ready'); until_asked_to_stop()\n"
        "for _ in range(20): print('still at work'); time.sleep(.01)\n"
        "Path(f'saved.{rank}').touch(); tell('end', 1); sys.exit(143)"
    )
    pid, master = pty.fork()  # a terminal that is the supervisor's own, as a person's is
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` has it ignored
        environment = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
        os.execve(sys.executable, [sys.executable, *command(program)], environment)
    ended = select.poll()
    ended.register(os.pidfd_open(pid), select.POLLIN)
    try:
        until_ready(tmp_path)
        os.close(master)
        assert ended.poll(30_000), "still running"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert len(list(tmp_path.glob("saved.*"))) == 2


def test_a_console_on_a_full_disk_does_not_end_the_run(tmp_path):
    program = "print('a line'); time.sleep(.2); print('the end')"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, *command(program, workers=1)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
            stdout=full,
            stderr=full,
            timeout=60,
        )
    assert done.returncode == 0
    assert log(tmp_path, 0) == "a line\nthe end\n"


def test_logs_and_reports_that_cannot_be_written_neither_end_the_run_nor_hide_the_cause(tmp_path):
    limited = [
        "bash",
        "-c",
        'ulimit -f 1; exec "$@"',
        "bash",
        sys.executable,
    ]  # 1 KB a file, as on a disk that fills up
    environment = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
    program = "print('x' * 2000); print('y' * 2000); sys.exit(3)"
    arguments = [*limited, *command(program, workers=1, flags=["--report=no/such/folder"])]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert len(log(tmp_path, 0)) == 1024
    assert done.stdout.count("x") + done.stdout.count("y") == 4000
    assert done.stderr.count("lacks lines from here on (File too large); the run goes on.") == 1
    assert "the report no/such/folder cannot be written (No such file or directory)." in done.stderr
    assert "ended with exit code 3" in done.stderr.splitlines()[-3]


@pytest.mark.parametrize(
    ("flags", "program", "sentence"),
    [
        (["--logs_dir=/dev/null/logs"], "true", "the log /dev/null/logs/rank_0/attempt_0.log cannot be written (Not a"),
        ([], "./no_program", "./no_program cannot be started (Exec format error); give a program that"),
    ],
)
def test_what_cannot_be_started_is_told_in_a_sentence(tmp_path, flags, program, sentence):
    (tmp_path / "no_program").write_text("hello")
    (tmp_path / "no_program").chmod(0o755)
    code, _, err = harness.run("-m", "launch.run", *flags, "--", program, fresh=True, cwd=tmp_path)
    assert code == 69
    assert err.startswith(f"distloop: host {os.uname().nodename}: {sentence}"), err


def test_a_worker_that_has_changed_its_folder_still_tells_its_error(tmp_path):
    code, _, err = run("os.chdir('/'); fail('no more disks', step=0)", tmp_path, workers=1)
    assert code == 1
    assert "OSError: no more disks" in err


def test_the_first_failure_ends_all_within_a_second_with_its_exit_code_and_is_told_last(tmp_path):
    program = "meet('ready'); print('now', time.time()); rank or forever(); print('about to fail'); sys.exit(3)"
    code, _, err = run(program, tmp_path, workers=3)
    ended = time.time()
    assert code == 3
    began = float(re.findall(r"now ([\d.]+)", log(tmp_path, 1))[0])
    assert ended - began < 5  # of which the limit is one second; the rest is a loaded machine's
    *_, lines, cause, why, where = err.splitlines()
    assert lines.strip() == "about to fail"
    assert re.fullmatch(r"distloop: rank [12] on \S+: ended with exit code 3", cause)
    assert why == "distloop: It is not restarted: the error came before the first step."
    rank = int(re.findall(r"rank (\d)", cause)[0])
    assert where == f"distloop: its log is distloop_logs/rank_{rank}/attempt_0.log"


def test_the_cause_is_the_worker_with_the_error_and_not_the_one_that_followed(tmp_path):
    program = (
        "tell('compile', 4); time.sleep(.2); tell('step', 7); meet('ready')\n"
        "if rank == 0: fail('a peer has gone', step=7, collateral=True, exit_code=138)\n"
        "if rank == 1: time.sleep(.3); fail('no more disks', step=7)\n"
        "forever()"
    )
    code, _, err = run(program, tmp_path, workers=3, flags=["--max_restarts=0"])
    assert code == 1
    assert "Traceback (most recent call last):\nOSError: no more disks\n" in err
    assert "distloop: rank 1 on this host in step after step 7: OSError: no more disks\n" in err
    assert err.endswith("distloop: its log is distloop_logs/rank_1/attempt_0.log\n")
    assert "a peer has gone" not in err
    (report,) = tmp_path.glob("distloop_logs/rank_0/*.report.json")
    told = json.loads(report.read_text())
    assert (told["rank"], told["phase"], told["step"], told["code"]) == (1, "step", 7, 1)
    assert "--max_restarts" in told["why_no_restart"]


def test_the_stacks_of_the_others_are_in_their_logs(tmp_path):
    program = "tell('compile', 0); meet('ready'); rank or sys.exit(3); forever()"
    run(program, tmp_path, flags=["--max_restarts=0"])
    assert re.search(r"(Current thread|Thread) 0x.*\n.* in forever", log(tmp_path, 1))


def test_workers_behind_a_script_leave_their_stacks_and_their_errors_count(tmp_path):
    program = (
        PROGRAM + "tell('compile', 0); meet('ready')\n"
        "if rank == 1: fail('a peer has gone', step=0, collateral=True, exit_code=138)\n"
        "time.sleep(.5); rank or fail('no more disks', step=0); forever()"
    )
    script = ["bash", "-c", '"$@"; echo done', "bash", sys.executable, "-c", program]
    code, _, err = harness.run("-m", "launch.run", "--workers=3", "--", *script, fresh=True, cwd=tmp_path)
    assert code == 1
    assert "OSError: no more disks" in err
    assert "most recent call first" in log(tmp_path, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_a_signal_ends_is_named_with_it_and_all_start_again(tmp_path, number):
    program = (
        "tell('compile', 0); time.sleep(.2); tell('step', 5); meet(f'ready{attempt()}')\n"
        f"if rank == 1 and not Path('again').exists(): Path('again').touch(); os.kill(os.getpid(), {int(number)})\n"
        "if rank == 0 and log_count() < 2: forever()"
    ).replace("log_count()", "int(Path('attempt.0').read_text())")
    code, _, err = run(program + "\ntell('end', 5)", tmp_path)
    assert code == 0, err
    assert f"rank 1 on {os.uname().nodename} in step after step 5: was killed by {number.name}" in err
    assert re.search(r"all workers start again in (0\.[789]|1\.[0123]) s", err)
    assert len(list(tmp_path.glob("distloop_logs/rank_*/attempt_1.log"))) == 2


def test_the_same_error_at_the_same_step_twice_is_not_tried_a_third_time(tmp_path):
    program = "tell('compile', 0); time.sleep(.2); tell('step', 5); print(attempt()); fail('no more disks', step=5)"
    code, out, err = run(program, tmp_path, workers=1)
    assert code == 1
    assert out.split() == ["0", "1"]
    assert "It is not restarted: the same error came at the same step twice." in err


def test_the_step_of_an_error_is_that_of_its_record_though_the_beacon_is_late(tmp_path):
    program = (
        "number = attempt(); tell('compile', 0); time.sleep(.3); tell('step', 5 - number)\n"
        "print(number); fail('no more disks', step=5)"
    )
    code, out, err = run(program, tmp_path, workers=1)
    assert code == 1
    assert out.split() == ["0", "1"]
    assert "the same error came at the same step twice" in err


@pytest.mark.parametrize("record", ["", "{", "[]", '{"type": "ours"}'])
def test_a_record_that_is_not_whole_is_none(tmp_path, record):
    program = f"Path(os.environ['DISTLOOP_ERROR_FILE']).write_text({record!r}); sys.exit(3)"
    code, _, err = run(program, tmp_path, workers=1)
    assert code == 3
    assert "ended with exit code 3" in err
    assert "Traceback" not in err


def test_a_usage_error_is_one_sentence_and_no_restart(tmp_path):
    code, _, err = run("fail('workdir is not given.', step=0, exit_code=64)", tmp_path, workers=1)
    assert code == 64
    assert "OSError" not in err
    assert "Traceback" not in err
    assert "workdir is not given." in err


def test_a_worker_that_ends_well_too_early_is_a_failure(tmp_path):
    program = "tell('compile', 0); time.sleep(.2); tell('step', 5); meet('ready'); rank or forever()"
    code, _, err = run(program, tmp_path, flags=["--max_restarts=0"])
    assert code == 1
    assert "in step after step 5: ended with exit code 0 before its work was done" in err


def test_a_program_that_is_not_distloops_may_end_when_it_likes(tmp_path):
    code, _, _ = run("meet('ready'); rank or time.sleep(.5)", tmp_path)
    assert code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_supervisor_asks_all_workers_to_stop(tmp_path, number):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else inherited, as `nohup pytest` has it
    program = "tell('compile', 0); tell('step', 1); meet('ready'); until_asked_to_stop(); tell('end', 1); sys.exit(143)"
    process = start(program, tmp_path)
    signal.signal(signal.SIGHUP, before)
    until_ready(tmp_path, process)
    os.kill(process.pid, number)
    code, _, err = harness.finish(process, limit_secs=30)
    assert code == 143
    assert err == f"distloop: {number.name}: the workers are asked to stop, within 30 s (--grace).\n"


@pytest.mark.parametrize(("collateral", "expected"), [(False, 1), (True, 143)])
def test_an_error_while_all_stop_is_told_and_nothing_starts_again(tmp_path, collateral, expected):
    program = (
        "tell('compile', 0); time.sleep(.2); tell('step', 1); meet('ready'); until_asked_to_stop()\n"
        f"rank or fail('the disk is full', step=1, collateral={collateral}, exit_code={138 if collateral else 1})\n"
        "forever()"
    )
    process = start(program, tmp_path)
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = harness.finish(process, limit_secs=30)
    assert code == expected
    assert ("OSError: the disk is full" in err) == (not collateral)
    assert "start again" not in err


def test_numbers_that_are_no_longer_finite_are_told_although_another_worker_does_not_end(tmp_path):
    program = "tell('compile', 0); meet('ready'); rank or fail('the loss is NaN', step=1, exit_code=65); forever()"
    code, _, err = run(program, tmp_path, flags=["--grace=0.5"])
    assert code == 65
    assert "the loss is NaN" in err


def test_a_worker_that_does_not_stop_in_time_is_killed(tmp_path):
    process = start("tell('compile', 0); tell('step', 1); meet('ready'); forever()", tmp_path, flags=["--grace=0.5"])
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = harness.finish(process, limit_secs=30)
    assert code == 137
    assert "rank 0, 1 did not stop within 0.5 s and is killed." in err


def test_a_signal_that_a_scheduler_repeats_is_one_request(tmp_path):
    program = (
        "tell('compile', 0); tell('step', 1); meet('ready'); until_asked_to_stop()\n"
        "while not Path('twice').exists(): time.sleep(.01)\n"
        "time.sleep(.3); tell('end', 1); sys.exit(143)"
    )
    process = start(program, tmp_path)
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: "asked to stop" in process.output()[1], process)
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "twice").touch()
    assert harness.finish(process, limit_secs=30)[0] == 143


def test_a_second_interrupt_ends_all_at_once(tmp_path):
    process = start("tell('compile', 0); tell('step', 1); meet('ready'); forever()", tmp_path)
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "asked to stop" in process.output()[1], process)
    os.kill(process.pid, signal.SIGINT)
    code, _, _ = harness.finish(process, limit_secs=30)
    assert code == 130


def test_a_program_that_is_not_distloops_is_sent_the_signal(tmp_path):
    process = start("meet('ready'); time.sleep(100)", tmp_path)
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = harness.finish(process, limit_secs=30)
    assert code == 143, err


def test_a_request_that_comes_too_early_for_the_program_is_heard_later(tmp_path):
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); meet('ready'); time.sleep(.5)\n"
        "tell('compile', 0); until_asked_to_stop(); tell('end', 1); sys.exit(143)"
    )
    process = start(program, tmp_path)
    until_ready(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)
    assert harness.finish(process, limit_secs=20)[0] == 143


def test_a_signal_between_two_attempts_ends_the_wait(tmp_path):
    process = start("os.kill(os.getpid(), 9)", tmp_path, workers=1, flags=["--max_restarts=100"])
    until(lambda: "all workers start again in" in process.output()[1], process)
    os.kill(process.pid, signal.SIGTERM)
    code, _, _ = harness.finish(process, limit_secs=30)
    assert code == 143


def test_no_worker_outlives_a_killed_supervisor(tmp_path):
    process = start("meet('ready'); forever()", tmp_path)
    until_ready(tmp_path, process)
    assert len(processes_in(tmp_path)) == 3
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not processes_in(tmp_path), limit_secs=5)
    harness.finish(process)


GRANDCHILD = (
    "import os, signal, time; os.setsid(); signal.signal(15, signal.SIG_IGN); open('there', 'w'); time.sleep(600)"
)


def test_what_workers_have_started_is_ended_too_even_in_a_session_of_its_own_and_deaf(tmp_path):
    program = (
        f"import subprocess; subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}])\n"
        "while not Path('there').exists(): time.sleep(.01)\nsys.exit(3)"
    )
    code, _, _ = run(program, tmp_path, workers=1)
    assert code == 3
    assert not processes_in(tmp_path)


def test_a_worker_that_closes_its_output_is_still_watched(tmp_path):
    code, _, err = run("os.close(1); os.close(2); time.sleep(.3); os._exit(5)", tmp_path, workers=1)
    assert code == 5
    assert "ended with exit code 5" in err


def test_a_worker_that_hangs_is_named_with_its_stack_and_all_start_again(tmp_path):
    program = (
        "\ndef stuck_in_my_code(): forever()\n"
        "number = attempt(); tell('compile', 0); time.sleep(.2)\n"
        "for step in range(1, 20):\n"
        "    time.sleep(.05); tell('step', step)\n"
        "    if number == 0 and step == 10 - rank: stuck_in_my_code()\n"
        "tell('end', 20)"
    )
    code, _, err = run(program, tmp_path, flags=["--hang_timeout=step:1"])
    assert code == 0, err
    assert re.search(r"rank 1 on \S+ in step after step 9: hung: no progress for [12] s \(--hang_timeout=step:1\)", err)
    assert re.search(r"in stuck_in_my_code\b", err)
    assert "in stuck_in_my_code" in log(tmp_path, 0)


def test_a_slow_worker_is_left_alone_for_others_wait_for_it(tmp_path):
    program = (
        "tell('compile', 0); time.sleep(.1); tell('step', 1); meet('ready')\n"
        "if rank == 0: tell('save', 1); time.sleep(3); tell('step', 2)\n"
        "meet('saved'); tell('end', 2)"
    )
    code, _, err = run(program, tmp_path, flags=["--hang_timeout=step:1,save:60"])
    assert (code, err) == (0, "")


def test_a_port_that_was_taken_meanwhile_is_replaced_by_another_one(tmp_path):
    program = (
        "print(os.environ['TF_CONFIG'])\n"
        "if attempt() == 0: fail('the port is taken', step=0, exit_code=69, kind='PortTakenError')\n"
        "tell('end', 0)"
    )
    code, _, err = run(program, tmp_path)
    assert code == 0, err
    ports = [set(re.findall(r":(\d{4,5})", log(tmp_path, 0, attempt))) for attempt in (0, 1)]
    assert len(ports[0]) == len(ports[1]) == 2
    assert not ports[0] & ports[1]


def test_a_host_without_the_chief_says_where_to_look(tmp_path):
    ports = free_ports(2)
    hosts = f"--hosts=127.0.0.1:{ports[0]},127.0.0.2:{ports[1]}"
    both = [start("print('hello')", tmp_path, workers=1, flags=[hosts, f"--host_index={index}"]) for index in (0, 1)]
    ended = [harness.finish(process, limit_secs=60) for process in both]
    assert ended[0][:2] == (0, "hello\n")
    told = "the workers start; host 127.0.0.1 shows the progress, the logs of this one are in distloop_logs."
    assert ended[1][:2] == (0, "")
    assert told in ended[1][2]
    assert told not in ended[0][2]


def test_what_is_left_of_other_runs_is_neither_overwritten_nor_taken_for_the_cause(tmp_path):
    left = tmp_path / "distloop_logs/rank_1"
    left.mkdir(parents=True)
    (left / "attempt_4.log").write_text("old")
    (left / "attempt_5.error.json").write_text("{}")
    code, _, err = run("rank == 0 or sys.exit(3)", tmp_path)
    assert code == 3, err
    assert err.endswith("distloop: its log is distloop_logs/rank_1/attempt_6.log\n")
    assert log(tmp_path, 1, 4) == "old"


def test_the_report_and_the_logs_are_where_the_flags_say(tmp_path):
    program = "print(sys.argv); sys.exit(3)"
    arguments = [*command(program, workers=1, flags=["--report=told"]), "--workdir=runs/one"]
    code, _, err = harness.run(*arguments, fresh=True, cwd=tmp_path)
    assert code == 3
    assert (tmp_path / "told").read_text() == err
    assert (tmp_path / "runs/one/logs/rank_0/attempt_0.log").exists()
    code, _, _ = harness.run(*command(program, workers=1, flags=["--logs_dir=there"]), fresh=True, cwd=tmp_path)
    assert (tmp_path / "there/rank_0/attempt_0.log").exists()


def test_a_program_that_is_not_there_is_told_before_anything_starts(tmp_path):
    code, _, err = harness.run("-m", "launch.run", "--", "no-such-program", fresh=True, cwd=tmp_path)
    assert code == 69
    assert f"distloop: host {os.uname().nodename}: there is no program no-such-program on PATH; install it" in err
    assert not list(tmp_path.iterdir())


def test_a_fault_is_for_one_rank_and_one_attempt(tmp_path):
    program = (
        "print('fault', os.environ.get('DISTLOOP_FAULT')); meet(f'ready{attempt()}'); tell('compile', 0)\n"
        "'DISTLOOP_FAULT' in os.environ and os.kill(os.getpid(), 9)\n"
        "Path('ready2.0').exists() or forever()\ntell('end', 0)"
    )
    code, _, err = run(program, tmp_path, flags=["--fault=1:5:kill,0:7:hang"])
    assert code == 0, err
    told = [[log(tmp_path, rank, attempt).split()[1] for rank in (0, 1)] for attempt in range(3)]
    assert told == [["None", "5:kill"], ["7:hang", "None"], ["None", "None"]]


def test_a_dry_run_prints_lines_that_a_shell_can_run_and_starts_nothing(tmp_path):
    code, out, _ = run("print('it is', rank)", tmp_path, flags=["--dry_run"])
    assert code == 0
    assert not list(tmp_path.iterdir())
    lines = out.splitlines()
    ran = [
        subprocess.run(
            ["sh", "-c", line],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
            timeout=60,
        )
        for line in lines
    ]
    assert [done.stdout for done in ran] == ["it is 0\n", "it is 1\n"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no command; expected one behind --, as in python -m launch.run"),
        (["x"], "unexpected argument 'x'; expected flags, as in python -m launch.run"),
        (["--worker=2", "--", "true"], "Unknown command line flag 'worker'. Did you mean: workers ?. See --help."),
        (["--console=some", "--", "true"], "console"),
        (["--hang_timeout=walk:3", "--", "true"], "hang_timeout has 'walk:3'; expected PHASE:SECONDS, such as step:60"),
        (["--hang_timeout=step", "--", "true"], "hang_timeout has 'step'; expected PHASE:SECONDS"),
        (["--fault=1:0:kill", "--", "true"], "fault has '1:0:kill'; expected RANK:STEP:KIND, such as 1:20:kill"),
        (["--fault=1:5:bite", "--", "true"], "fault has '1:5:bite'; expected RANK:STEP:KIND"),
        (
            ["--num_hosts=2", "--", "true"],
            "num_hosts is given without --emit, which it belongs to; add --emit, or drop",
        ),
        (["--grace=-1", "--", "true"], "flag --grace=-1: -1.0 is not a non-negative number."),
        (["--fault=1:5:kill", "--", "true"], "fault is for rank 1, but the run has 1 worker(s), numbered from 0."),
    ],
)
def test_what_cannot_work_is_told_in_a_sentence(arguments, sentence):
    code, out, err = harness.run("-m", "launch.run", *arguments, fresh=True)
    assert (code, out) == (64, "")
    assert sentence in err
    assert "Traceback" not in err


def test_an_interrupted_command_that_supervises_nothing_shows_no_traceback():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # else inherited from a job in the background
    process = harness.start(["-m", "launch.doctor"], fresh=True)
    signal.signal(signal.SIGINT, before)
    until(lambda: "memory" in process.output()[0], process)
    os.kill(process.pid, signal.SIGINT)
    code, _, err = harness.finish(process, limit_secs=30)
    assert (code, err) == (130, "distloop: interrupted.\n")


def test_the_supervisor_loads_no_tensorflow():
    program = "import sys; from distloop import launcher_flags; print(*sys.modules)"
    _, out, _ = harness.run("-c", program, fresh=True)
    assert {"absl"} <= {name.split(".")[0] for name in out.split()}
    assert not {name.split(".")[0] for name in out.split()} & {"tensorflow", "keras", "numpy", "rich", "etils"}
