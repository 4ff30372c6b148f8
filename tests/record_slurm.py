"""Record what a real Slurm tells its tasks: python -m tests.record_slurm writes tests/data/slurm.json.

Each entry has the command (TASK is the program), the environment of every task in the order of SLURM_PROCID, and what
`scontrol show hostnames` makes of the node list of the step. Variables that say nothing of the cluster are left out.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import real_slurm

FILE = Path(__file__).with_name("data") / "slurm.json"
NODES = ("n8", "n9", "n10", "n11", "r1g1", "r1g2", "r2g1", "r2g2")
_KEPT = re.compile(r"SLURM(D_NODENAME|_.*)|CUDA_VISIBLE_DEVICES")
_LEFT_OUT = re.compile(r"SLURM_(CONF|.*(PORT|HOST|ADDR|UID|GID|USER|DIR|PID|UMASK|CLUSTER|PATTERN|PRIO).*)")
_TWO_COMPONENTS = ["salloc", "-Q", "-N2", "-n3", "-w", "n[9-10]", ":", "-N1", "-n2", "-w", "n8"]
COMMANDS = {
    "one task a node": ["srun", "-N3", "--ntasks-per-node=1", "-w", "n[8-10]"],
    "several tasks a node": ["srun", "-N2", "--ntasks-per-node=2", "-w", "n[9-10]"],
    "uneven tasks": ["srun", "-N3", "-n5", "-w", "n[8-10]"],
    "GPUs of a node": ["srun", "-N2", "--ntasks-per-node=1", "--gpus-per-node=2", "-w", "n[8-9]"],
    "GPUs of a task": ["srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", "-w", "n[8-9]"],
    "all tasks see all GPUs": ["srun", "-N1", "-n2", "--gres=gpu:4", "-w", "n8"],
    "GPUs bound by hand": ["srun", "-N1", "-n2", "--gres=gpu:4", "--gpu-bind=map_gpu:3,1", "-w", "n8"],
    "names with two numbers": ["srun", "-N4", "--ntasks-per-node=1", "-w", "r[1-2]g[1-2]"],
    "names of two kinds": ["srun", "-N3", "--ntasks-per-node=1", "-w", "n8,n11,r2g1"],
    "cyclic ranks": ["srun", "-N2", "-n4", "-m", "cyclic", "-w", "n[8-9]"],
    "two ranks at a time": ["srun", "-N2", "-n6", "-m", "plane=2", "-w", "n[8-9]"],
    "ranks by a list": ["srun", "-n3", "-m", "arbitrary", "-w", "n9,n8,n9"],
    "a step on one node of three": ["salloc", "-Q", "-N3", "-w", "n[8-10]", "srun", "-N1", "-n1", "-w", "n9"],
    "a step on two nodes of three": ["salloc", "-Q", "-N3", "-w", "n[8-10]", "srun", "-N2", "-n2", "-w", "n[9-10]"],
    "a heterogeneous job": ["srun", "-N1", "-n1", "-w", "n9", ":", "-N1", "-n2", "--gres=gpu:1", "-w", "n8"],
    "both components": [*_TWO_COMPONENTS, "srun", "--het-group=0,1"],
    "one component": [*_TWO_COMPONENTS, "srun", "--het-group=1"],
    "no step": ["salloc", "-Q", "-N2", "-w", "n[8-9]"],
}
FORMS = (
    *("n1", "n01", "n[1-3]", "n[01-03]", "n[01-03,7]", "n[8-11]", "n[08-11]", "n[098-101]", "n[9-10,3,5-6]", "n[2,10]"),
    *("a,b", "b,a", "n2,n10", "a,a", "n[1-2],m[3-4]", "n1,m[1-2],k", "n[1-2]-ib", "n[01-02]-ib0", "r[1-2]n[1-2]"),
    *("r[01-02]n[1,3]-x", "gpu-a-01", "gpu-a-[01-02],cpu-1", "x-[1-2]-y-[3-4]", "127.0.0.[2-3]", "n[5]", "n[1-2],n3"),
    *("host.example.org", "h[1-2].example.org", "n[1,1]", "n[3-1]", "node-[0-1]0", "n[0-0]", "n_1,n_[2-3]"),
    *(
        "r[1-2]c[3,5]n[08-09]",
        "a[1-2]b[1-2]c[1-2]d[1-2]",
        "n[01-2]",
        "n[9-010]",
        "[1-3]",
        "n[65530-65536]",
        "n[1-70000]",
    ),
    *("n[]", "n[a-b]", "n[1,]", "n[,1]", "n[1;2]", "n[-3]", "n[1--3]", "n[[1-3]]", "n[1-3]]", "n[0x1-0x3]"),
)
# Into a file each: srun mixes long lines.
_TASK = [sys.executable, "-c", "import os, json; json.dump(dict(os.environ), open(f'{os.getpid()}.json', 'w'))"]


def record(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return all entries, and the hosts of each form of a node list."""
    forms = {form: _hostnames(form, environment) for form in FORMS}
    return {"forms": forms, "steps": {name: _entry(command, environment) for name, command in COMMANDS.items()}}


def _entry(command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    step = " ".join([*command, "TASK"]).replace(" : ", " TASK : " if command[0] == "srun" else " : ").split()
    words = [word for part in step for word in (_TASK if part == "TASK" else [part])]
    with tempfile.TemporaryDirectory() as folder:
        _output(words, environment, folder)
        tasks = [_told(json.loads(file.read_text())) for file in Path(folder).iterdir()]
    tasks.sort(key=lambda task: int(task.get("SLURM_PROCID", 0)))
    nodes = tasks[0].get("SLURM_STEP_NODELIST", tasks[0]["SLURM_JOB_NODELIST"])
    return {"command": step, "hostnames": _hostnames(nodes, environment), "tasks": tasks}


def _hostnames(form: str, environment: Mapping[str, str]) -> list[str]:
    return _output(["scontrol", "show", "hostnames", form], environment, None).split()


def _told(task: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in task.items() if _KEPT.fullmatch(name) and not _LEFT_OUT.fullmatch(name)}


def _output(command: list[str], environment: Mapping[str, str], folder: str | None) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    return done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, real_slurm.cluster(Path(folder), NODES) as environment:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(record(environment), indent=1, sort_keys=True) + "\n")
