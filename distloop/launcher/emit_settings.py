"""What an emitted file has to know beyond the flags of the run: a frozen dataclass, one field a flag."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from distloop.errors import UsageError

KINDS = ("sbatch", "jobset", "job", "tfjob", "tpu")
_IN_PODS = ("jobset", "job", "tfjob")
_LONGEST_NAME = 40  # of 63 in a host name, which also has the indices of job and pod
_PLACES = ("cluster", "hosts", "host_index")  # flags that say where a supervisor is: the file says it
_OURS = {**dict.fromkeys(KINDS, _PLACES), **dict.fromkeys(_IN_PODS, (*_PLACES, "report"))}


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Settings:
    """Hold the flags that only --emit reads. The fields have the flags' names, defaults and helps."""

    num_hosts: int = _setting(1, "hosts: nodes, pods or TPU VMs")
    name: str = _setting("distloop", "name of the job")
    gpus_per_host: int = _setting(0, "GPUs to ask for on each host")
    cpus_per_host: int = _setting(0, "cores to ask for on each host (0: a whole Slurm node; no request in Kubernetes)")
    image: str | None = _setting(
        None, "container image that has distloop; for tpu, the software version of the TPU VMs"
    )
    volume: str | None = _setting(
        None, "CLAIM:/path, a persistent volume claim and where pods see it; holds the workdir"
    )
    partition: str | None = _setting(None, "Slurm partition (default: the cluster's)")
    time_limit: str | None = _setting(None, "Slurm time limit, such as 1-00:00:00 (default: the partition's)")
    max_requeues: int = _setting(100, "how often a Slurm job that was stopped with a checkpoint goes back to the queue")
    tpu_type: str | None = _setting(None, "TPU accelerator type, such as v4-8")
    tpu_zone: str | None = _setting(None, "zone of the TPU, such as us-central2-b")

    def words(self) -> list[str]:
        """Return the flags that differ from their defaults, as they are typed."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return [f"--{name}={value}" for name, value in values.items() if value != getattr(Settings, name)]


@dataclass(frozen=True)
class Request:
    """Hold all that an emitted file is made of: its settings, the run's own flags as typed, and the command."""

    kind: str
    settings: Settings
    run_flags: tuple[str, ...]
    command: tuple[str, ...]
    grace_secs: int
    max_restarts: int

    def check(self) -> None:
        """Raise UsageError for what the file could not work with."""
        settings = self.settings
        if self.kind not in KINDS:
            raise UsageError(f"emit is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        if not self.command:
            raise UsageError(f"--emit={self.kind} has no command; write it behind --, as in -- python -m launch.train.")
        for name, least in (("num_hosts", 1), ("gpus_per_host", 0), ("cpus_per_host", 0), ("max_requeues", 0)):
            if getattr(settings, name) < least:
                raise UsageError(f"{name} is {getattr(settings, name)}; expected at least {least}.")
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", settings.name) or len(settings.name) > _LONGEST_NAME:
            raise UsageError(
                f"name is {settings.name!r}; expected at most {_LONGEST_NAME} lower-case letters, digits and '-', "
                "a letter first: it becomes part of host names."
            )
        for name in _OURS[self.kind]:
            if self.has_run_flag(name):
                raise UsageError(f"--emit={self.kind} writes --{name} itself; leave it out.")
        if self.kind in ("tfjob", "tpu") and self.has_run_flag("workers"):
            raise UsageError(
                f"--emit={self.kind} starts one worker a host, which drives all its devices; drop --workers."
            )
        needed = (
            ("image", "tpu_type", "tpu_zone") if self.kind == "tpu" else ("image",) if self.kind in _IN_PODS else ()
        )
        for name in needed:
            if not getattr(settings, name):
                raise UsageError(f"--emit={self.kind} needs --{name}: {_help(name)}.")
        if self.kind in _IN_PODS:
            self._check_volume()

    def has_run_flag(self, name: str) -> bool:
        """Tell whether this flag of the run was given."""
        return any(re.match(rf"--?{name}(=|$)", word) for word in self.run_flags)

    def _check_volume(self) -> None:
        volume, workdir = self.settings.volume, workdir_of(self.command)
        if volume is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?:/.*", volume):
            raise UsageError(f"volume is {volume!r}; expected CLAIM:/path, such as training:/runs.")
        if workdir is None or "://" in workdir:
            return
        path = volume.partition(":")[2].rstrip("/") if volume else None
        if path is None or not workdir.startswith(f"{path}/"):
            raise UsageError(
                f"workdir {workdir} is on no volume that all pods share and that outlives them; give "
                "--volume=CLAIM:/path and a workdir under that path, or a remote workdir such as gs://bucket/run."
            )


def workdir_of(command: Sequence[str]) -> str | None:
    """Return what the command gives as --workdir, if it gives one."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == "workdir":
            return value if equals else following
    return None


def _help(name: str) -> str:
    return next(setting.metadata["help"] for setting in fields(Settings) if setting.name == name)
