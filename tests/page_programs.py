"""What stands for the programs of docs/launch, each line of which runs: python -m tests.page_programs NAME ARGUMENT...

`launch.run` is the real one, with --dry_run where it would start workers. Of our other commands the flags are looked up
in their --help. The schedulers' programs take files only that they could read, and flags of the list below only.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

TAKEN = {
    "kubectl": r"(apply|delete) -f \S+|get pods -l jobset\.sigs\.k8s\.io/jobset-name=\S+|logs job/\S+",
    "sbatch": r"\S+",
    "bash": r"\S+",
    "srun": r"--nodes=\d+ --ntasks-per-node=\d+ python -m launch\.run .*",
}


def main(name: str, arguments: Sequence[str]) -> int:
    """Return the exit code of the line."""
    if name == "python":
        return _python(arguments)
    line = " ".join(arguments)
    assert re.fullmatch(TAKEN[name], line), f"{name} {line}"
    if name == "srun":
        return _python(arguments[arguments.index("python") + 1 :])
    for file in map(Path, arguments):
        if file.suffix == ".yaml":
            assert all(one["metadata"]["name"] for one in yaml.safe_load_all(file.read_text()))
        elif name in ("sbatch", "bash"):
            assert file.read_text().startswith("#!/bin/bash\n")
            subprocess.run(["/bin/bash", "-n", file], check=True)
    return 0


def _python(arguments: Sequence[str]) -> int:
    assert arguments[0] == "-m"
    module, *rest = arguments[1:]
    if module != "launch.run":
        return _flags_exist(module, rest)
    own, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    assert command[:2] == ["python", "-m"]
    assert _flags_exist(command[2], command[3:]) == 0
    if not any(word.startswith("--emit") for word in own):
        own = [*own, "--dry_run"]
    if any(word.startswith("--hosts") for word in own):
        own = [*own, "--host_index=0"]
    return subprocess.run([sys.executable, "-m", module, *own, "--", *command]).returncode


def _flags_exist(module: str, words: Sequence[str]) -> int:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        assert re.search(rf"--(\[no\])?{name}:", done.stdout), f"{module} has no flag --{name}\n{done.stderr}"
    return 0 if done.stdout else 1


if __name__ == "__main__":
    os.environ.pop("SLURM_JOB_ID", None)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
