"""A real Slurm for tests: munged, slurmctld and a slurmd for each node, in a folder of their own, on free ports.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge; no service, no privileges, no control groups. Several
nodes are on this machine (Slurm's "multiple slurmd" mode). A node that is called 127.0.0.2 can be reached by its name.
GPUs are links to /dev/null, which is enough for Slurm to share them out.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distloop.launcher.processes import free_ports
from tests.harness import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
_LIMIT_SECS = 30

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
PartitionName=test Nodes=ALL Default=YES
"""


def missing() -> str | None:
    """Say why Slurm cannot be started here, if so."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else None


@contextlib.contextmanager
def cluster(folder: Path, nodes: Sequence[str], *, cpus: int = 4, gpus: int = 4) -> Iterator[Mapping[str, str]]:
    """Start Slurm on `nodes`, give the environment in which its commands find it, and leave nothing of it."""
    ports = iter(free_ports(1 + len(nodes)))
    _write_config(folder, nodes, ports, cpus=cpus, gpus=gpus)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file")]
    commands = {
        "munged": ["munged", "--foreground", "--force", "--num-threads=2", *munge, f"--seed-file={folder}/munge.seed"],
        "slurmctld": ["slurmctld", "-D", "-c"],
        **{f"slurmd-{node}": ["slurmd", "-D", "-N", node] for node in nodes},
    }
    with contextlib.ExitStack() as daemons:
        for name, command in commands.items():
            log = daemons.enter_context((folder / f"{name}.log").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            daemons.callback(_end, process)
            if name == "munged":
                until((folder / "munge.socket").exists, limit_secs=_LIMIT_SECS)
        until(lambda: _states(environment) == {"idle"}, limit_secs=_LIMIT_SECS, every_secs=0.1)
        daemons.callback(end_jobs, environment)
        yield environment


def left(folder: Path) -> list[str]:
    """Return the commands of the processes that belong to a Slurm in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def _write_config(folder: Path, nodes: Sequence[str], ports: Iterator[int], *, cpus: int, gpus: int) -> None:
    for name in ("state", *nodes):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for number in range(gpus):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    host = socket.gethostname().split(".")[0]
    lines = [_CONFIG.format(host=host, port=next(ports), user=getpass.getuser(), folder=folder)]
    for node in nodes:
        address = node if node.startswith("127.") else "127.0.0.1"
        place = f"NodeHostname={host} NodeAddr={address} Port={next(ports)}"
        lines.append(f"NodeName={node} {place} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")


def _states(environment: Mapping[str, str]) -> set[str]:
    return set(_ask(environment, "sinfo", "-N", "-h", "-o", "%T"))


def _ask(environment: Mapping[str, str], *command: str) -> list[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECS)
    return done.stdout.split()


def end_jobs(environment: Mapping[str, str]) -> None:
    """End all jobs, so that no process of theirs outlives the daemons."""

    def jobs() -> list[str]:
        return _ask(environment, "squeue", "-h", "-o", "%A")

    _ask(environment, "scancel", "--signal=KILL", "--full", *jobs())
    _ask(environment, "scancel", *jobs())
    until(lambda: not jobs(), limit_secs=_LIMIT_SECS, every_secs=0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_LIMIT_SECS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_LIMIT_SECS)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian has its daemons
