"""One supervisor a host, on hosts that share no network stack: they start, lose each other, and come back together."""

import socket
import sys

import pytest

from distloop.errors import PreflightError
from tests import faults, harness, namespaces
from tests.harness import ROOT, finish, kill, until
from tests.run_files import differences, last_logged

pytestmark = pytest.mark.slow
LIMIT_SECS = 300  # for a run of some seconds, on a machine that does other things too


@pytest.fixture(autouse=True)
def possible():
    namespaces.skip_unless_possible()


@pytest.fixture
def pair():
    with namespaces.hosts(2) as found:
        yield found
        assert [host.pids() for host in found] == [[], []]


PROGRAM = "import os, time; from tests.worker_program import *; "


def supervise(host, everyone, tmp_path, *flags, program=PROGRAM + "print('rank', rank, flush=True)", **environment):
    """Start the supervisor of a host for a small program."""
    names = ",".join(other.name for other in everyone)
    return host.start(
        *("-m", "launch.run", f"--hosts={names}", f"--logs_dir={tmp_path / 'logs'}", "--console=all", *flags),
        *("--", sys.executable, "-c", program, f"--workdir={tmp_path}"),
        **environment,
    )


def test_hosts_start_together_and_find_their_own_place(pair, tmp_path):
    # The second comes late.
    first = supervise(pair[0], pair, tmp_path, "--workers=2")
    until(lambda: "waiting for host b (10.77.0.2:" in first.output()[1], first)
    second = supervise(pair[1], pair, tmp_path, "--workers=2")
    results = [finish(process, limit_secs=60) for process in (first, second)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sorted(results[0][1].splitlines()) == ["[rank 0] rank 0", "[rank 1] rank 1"]
    assert sorted(results[1][1].splitlines()) == ["[rank 2] rank 2", "[rank 3] rank 3"]


def test_a_host_that_does_not_come_is_named(pair, tmp_path):
    code, out, err = finish(supervise(pair[0], pair, tmp_path, "--start_timeout=1"), limit_secs=30)
    assert code == PreflightError.exit_code
    assert not out
    assert "waited 1 s for host b (10.77.0.2:" in err
    assert "which refuses the connection: nothing listens there. Start the same command on every host" in err


def test_a_supervisor_that_is_killed_while_all_wait_may_come_back(tmp_path):
    with namespaces.hosts(3) as trio:
        first, second = (supervise(host, trio, tmp_path) for host in trio[:2])
        for process in (first, second):
            until(lambda process=process: "waiting for host c" in process.output()[1], process)
        trio[1].kill()
        assert second.wait(10) == -9
        later = [supervise(host, trio, tmp_path) for host in trio[1:]]
        codes, _ = ends([first, *later])
        assert codes == [0, 0, 0]
        assert [process.output()[0] for process in (first, *later)] == ["rank 0\n", "rank 1\n", "rank 2\n"]


def test_a_name_that_is_ipv6_loopback_only_will_do(tmp_path):
    with namespaces.hosts(1, ipv6=True) as (host,):
        flags = ("-m", "launch.run", "--hosts=localhost:24000,localhost:25000", f"--logs_dir={tmp_path}")
        program = (sys.executable, "-c", PROGRAM + "print('rank', rank)")
        codes, told = ends([host.start(*flags, f"--host_index={k}", "--", *program) for k in range(2)])
    assert codes == [0, 0], told


def test_the_doctor_sees_a_cut_link(pair):
    pair[1].cut()
    code, out, _ = finish(pair[0].start("-m", "launch.doctor", "--hosts=a,b"), limit_secs=LIMIT_SECS)
    assert code == PreflightError.exit_code
    assert [line[:15].split() for line in out.splitlines() if line.startswith("!!")] == [["!!", "unreachable"]]
    assert "unreachable b (port " in out
    assert "ok  here        number 0, a: rank 0, the chief" in out


def ends(processes, limit_secs=LIMIT_SECS):
    """Return the exit codes of all, and the last line that each has told."""
    results = [finish(process, limit_secs=limit_secs) for process in processes]
    return [code for code, _, _ in results], [err.splitlines()[-1] if err else "" for _, _, err in results]


ALL_REFUSED = [PreflightError.exit_code] * 2


def test_other_arguments_of_the_command_are_told_by_both(pair, tmp_path):
    same = ("-m", "launch.run", "--hosts=a,b", f"--logs_dir={tmp_path}", "--", sys.executable, "-m", "launch.train")
    codes, told = ends([host.start(*same, f"--workdir={tmp_path}", f"--seed={k}") for k, host in enumerate(pair)])
    assert codes == ALL_REFUSED
    for said in told:
        assert "host b has command --seed=1 (host a: --seed=0)" in said or (
            "host a has command --seed=0 (host b: --seed=1)" in said
        )
        assert "; start the same command on every host." in said


def test_another_version_of_tensorflow_is_told_by_both(pair, tmp_path):
    fake = tmp_path / "elsewhere" / "tensorflow-2.19.7.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.19.7\n")
    first = supervise(pair[0], pair, tmp_path)
    codes, told = ends([first, supervise(pair[1], pair, tmp_path, PYTHONPATH=f"{fake.parent}:{ROOT}")])
    assert codes == ALL_REFUSED
    for said in told:
        assert " has tensorflow 2." in said
        assert "2.19.7" in said
        assert "; install the same versions on all hosts." in said


def test_a_port_that_is_taken_is_told_by_both(pair, tmp_path):
    taken = "import socket, time; s = socket.create_server(('', 23456)); print(1, flush=True); time.sleep(600)"
    server = pair[1].start("-c", taken)
    until(lambda: server.output()[0], server)
    codes, told = ends([supervise(host, pair, tmp_path, "--port=23456") for host in pair])
    kill(server)
    assert codes == ALL_REFUSED
    assert told[0].startswith("distloop: the run is over on host b: port 23456 of this host is taken by process ")
    assert told[1].startswith(f"distloop: port 23456 of this host is taken by process {server.pid} (")


def test_a_workdir_that_cannot_be_written_on_one_host_is_told_by_both(pair, tmp_path):
    (tmp_path / "file").touch()
    flags = ("-m", "launch.run", "--hosts=a,b", "--port=23456", f"--logs_dir={tmp_path}", "--", "true")
    workdirs = (tmp_path / "run", tmp_path / "file")
    codes, told = ends([host.start(*flags, f"--workdir={path}") for host, path in zip(pair, workdirs, strict=True)])
    assert codes == ALL_REFUSED
    found = f"host {socket.gethostname()}: workdir {tmp_path}/file cannot be written to (File exists)"
    assert told[0].startswith(f"distloop: the run is over on host b: {found}")
    assert told[1].startswith(f"distloop: {found}")


def test_two_jobs_on_the_same_hosts_both_run(pair, tmp_path):
    jobs = [tmp_path / "one", tmp_path / "two"]
    processes = [supervise(host, pair, job, program=PROGRAM + f"print({job.name!r})") for job in jobs for host in pair]
    assert ends(processes) == ([0] * 4, [""] * 4)
    assert [process.output()[0].split()[-1] for process in processes] == ["one", "one", "two", "two"]


def test_a_run_that_is_given_up_on_one_host_ends_on_all_with_its_code(pair, tmp_path):
    program = PROGRAM + (
        "tell('step', 5)\n"
        "if rank: fail('it is broken', step=5)\n"
        "time.sleep(1); fail('the other has gone', step=5, collateral=True, exit_code=138)"
    )
    flags = [["--max_restarts=3"], ["--max_restarts=0"]]
    codes, told = ends(
        [supervise(host, pair, tmp_path, *f, program=program) for host, f in zip(pair, flags, strict=True)]
    )
    assert codes == [1, 1]
    assert told[0].startswith("distloop: the run is over on host ")
    assert told[0].endswith("rank 1: OSError: it is broken")


def train(host, folder, *flags, **environment):
    """Start the supervisor of a host for a run of `tests.faults`."""
    command = faults.Run(folder, workers=2).command
    supervisor = ("-m", "launch.run", "--hosts=a,b", f"--logs_dir={folder}_logs", "--start_timeout=60", *flags)
    return host.start(*supervisor, "--", sys.executable, *command, **environment)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run of two workers that nothing has happened to."""
    folder = tmp_path_factory.mktemp("clean")
    results = harness.run_workers(faults.Run(folder, workers=2).command, workers=2, limit_secs=LIMIT_SECS)
    assert [code for code, _, _ in results] == [0, 0], results
    return folder


def test_hosts_that_have_ipv6_addresses_only_train_together(tmp_path, clean):
    with namespaces.hosts(2, ipv6=True) as pair:
        folder = tmp_path / "run"
        codes, _ = ends([train(host, folder) for host in pair])
    assert codes == [0, 0]
    assert differences(folder, clean) == []


def test_a_host_that_is_killed_and_comes_back_goes_on_with_the_others(pair, tmp_path, clean):
    folder = tmp_path / "run"
    survivor, victim = (train(host, folder) for host in pair)
    until(lambda: last_logged(folder) >= 20, survivor, victim, limit_secs=LIMIT_SECS)
    pair[1].kill()
    assert victim.wait(10) == -9
    until(lambda: "waiting for host b" in survivor.output()[1], survivor)
    returned = train(pair[1], folder)
    results = [finish(process, limit_secs=LIMIT_SECS) for process in (survivor, returned)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert differences(folder, clean) == []


def test_a_worker_that_is_killed_on_one_host_is_replaced_on_all_and_the_bits_are_those_of_one_host(
    pair, tmp_path, clean
):
    folder, proxy = tmp_path / "run", {"http_proxy": "http://127.0.0.1:9"}  # which workers must not take
    processes = [train(pair[0], folder, **proxy), train(pair[1], folder, "--fault=1:20:kill", **proxy)]
    results = [finish(process, limit_secs=LIMIT_SECS) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert "SIGKILL" in results[1][2]
    assert differences(folder, clean) == []


def test_a_cut_link_that_is_healed_costs_a_restart(pair, tmp_path, clean):
    folder = tmp_path / "run"
    processes = [train(host, folder) for host in pair]
    until(lambda: last_logged(folder) >= 20, *processes, limit_secs=LIMIT_SECS)
    pair[1].cut()
    for process in processes:  # TensorFlow notices after 10 s without a heartbeat
        until(lambda process=process: "all workers start again" in process.output()[1], process, limit_secs=LIMIT_SECS)
    pair[1].heal()
    results = [finish(process, limit_secs=LIMIT_SECS) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert differences(folder, clean) == []
