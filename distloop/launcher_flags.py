"""The command line of the launcher; imports little, so that it starts fast: the standard library and absl.flags."""

import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from absl import flags

from distloop.cluster import is_this_machine
from distloop.errors import PreflightError, UsageError
from distloop.launcher import agreement, devices, emit_settings, plan, readiness, supervisor, topology, watchdog
from distloop.launcher.fault import check_ranks, parse_faults
from distloop.launcher.processes import free_ports
from distloop.say import say

_EXAMPLE = "python -m launch.run --workers=2 -- python -m launch.train --task=mnist_cnn --workdir=runs/two"


def run_main() -> None:
    """Run `distloop-run` and `python -m launch.run`: supervise a command in one or several processes."""
    _define_placement()
    _define(flags.DEFINE_float, "start_timeout", 300.0, "seconds to wait for the other hosts", lower_bound=0)
    _define(flags.DEFINE_string, "logs_dir", None, "folder of the logs (default: logs in the --workdir of the command)")
    _define(flags.DEFINE_enum, "console", "chief", "whose output to show", enum_values=supervisor.CONSOLES)
    _define(flags.DEFINE_integer, "max_restarts", 3, "restarts in a row without a new checkpoint", lower_bound=0)
    _define(
        flags.DEFINE_float,
        "grace",
        30.0,
        "seconds for all workers to stop with a checkpoint, after SIGTERM",
        lower_bound=0,
    )
    _define(flags.DEFINE_string, "hang_timeout", "", "PHASE:SECONDS,...: limits without progress, not learned ones")
    _define(flags.DEFINE_string, "fault", "", "RANK:STEP:KIND,...: rehearse a fault, the first in the first attempt")
    _define(flags.DEFINE_string, "report", None, "file that gets the cause of a failure, too")
    _define(flags.DEFINE_boolean, "dry_run", False, "print the commands of this host's workers and start nothing")
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    kinds = emit_settings.KINDS
    _define(flags.DEFINE_enum, "emit", None, "print a file that starts the run elsewhere", enum_values=kinds)
    for setting in fields(emit_settings.Settings):
        kind = flags.DEFINE_integer if isinstance(setting.default, int) else flags.DEFINE_string
        _define(kind, setting.name, setting.default, f"with --emit: {setting.metadata['help']}")
    _run(lambda command: _emit(command, own) if flags.FLAGS.emit else _supervise(command), example=_EXAMPLE)


def doctor_main() -> None:
    """Run `distloop-doctor` and `python -m launch.doctor`: what this machine and its cluster look like."""
    _define_placement()
    _define(flags.DEFINE_string, "workdir", None, "folder of a run, whose disk is looked at")
    _run(_examine, example="python -m launch.doctor --hosts=a,b --workdir=runs/first")


def _define_placement() -> None:
    _define(flags.DEFINE_string, "workers", "1", "worker processes a host, or per_gpu; one process drives all its GPUs")
    where = "where the other hosts are known from; auto takes what the environment and --hosts say"
    _define(flags.DEFINE_enum, "cluster", "auto", where, enum_values=topology.KINDS)
    _define(flags.DEFINE_list, "hosts", [], "names of all hosts, each with a port or without: the same list on each")
    _define(flags.DEFINE_integer, "host_index", None, "which of --hosts this is, from 0 (default: found by its name)")
    _define(flags.DEFINE_integer, "port", None, "first port of a host's workers (default: made from the job)")


def _define(kind: Callable[..., Any], name: str, default: Any, help_text: str, **more: Any) -> None:
    kind(name, default, **{"help": help_text, **more})
    # Shown by --help, which lists the flags of the script and not those of the modules it imports.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _run(main: Callable[[Sequence[str]], int], *, example: str) -> None:
    """Parse the flags before `--`, call `main(command)` with what follows, and exit."""
    flags.DEFINE_boolean("help", False, "show this help", short_name="h")
    own, command = _split(sys.argv)
    try:
        rest = flags.FLAGS(own)
        if flags.FLAGS.help:
            print(f"{example}\n{flags.FLAGS.main_module_help()}")
            sys.exit(0)
        if rest[1:]:
            raise UsageError(f"unexpected argument {rest[1]!r}; expected flags, as in {example}.")
        sys.exit(main(command))
    except flags.Error as error:
        say(f"{str(error).rstrip('.')}. See --help.")
        sys.exit(UsageError.exit_code)
    except (UsageError, PreflightError) as error:
        say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # but for a supervisor, which hears it as a request
        say("interrupted.")
        sys.exit(128 + signal.SIGINT)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


def _supervise(command: Sequence[str]) -> int:
    if not command:
        raise UsageError(f"there is no command; expected one behind --, as in {_EXAMPLE}.")
    values, workdir = flags.FLAGS, emit_settings.workdir_of(command)
    unused = [setting.name for setting in fields(emit_settings.Settings) if values[setting.name].present]
    if unused:
        raise UsageError(f"{unused[0]} is given without --emit, which it belongs to; add --emit, or drop it.")
    settings = supervisor.Settings(
        log_dir=Path(values.logs_dir or _default_log_dir(workdir)),
        console=values.console,
        max_restarts=values.max_restarts,
        grace_secs=values.grace,
        hang_limits=watchdog.parse_limits(values.hang_timeout),
        faults=parse_faults(values.fault),
        report=Path(values.report) if values.report else None,
        start_timeout_secs=values.start_timeout,
    )
    gpus, cores = devices.local_gpus(os.environ), len(os.sched_getaffinity(0))
    resolve = _resolver(workdir, gpus)

    def make_plan() -> tuple[topology.Topology, list[plan.Worker]]:
        found = resolve()
        check_ranks(settings.faults, workers=len(found.addresses))
        if found.needs_ports:
            found = found.with_ports(free_ports(len(found.here.ports)))
        return found, plan.make_plan(found, command, os.environ, gpus=gpus, cores=cores)

    if values.dry_run:
        print(*map(plan.shell_line, make_plan()[1]), sep="\n")
        return 0
    return supervisor.supervise(
        make_plan,
        settings,
        facts=lambda found: agreement.facts(command, found, gpus=len(gpus)),
        check_host=lambda: readiness.check_host(command, gpus=gpus, workdir=workdir),
    )


def _resolver(workdir: str | None, gpus: Sequence[str]) -> Callable[[], topology.Topology]:
    """Return a function that finds the workers from the flags and the environment."""
    values = flags.FLAGS
    placement = topology.Placement(
        workers=values.workers,
        cluster=values.cluster,
        hosts=tuple(values.hosts),
        host_index=values.host_index,
        port=values.port,
        workdir=workdir or "",
    )
    return lambda: topology.resolve(placement, os.environ, gpus=gpus, is_here=is_this_machine)


def _examine(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; expected flags: see --help.")
    from distloop.launcher import doctor  # which a run does not need

    workdir = flags.FLAGS.workdir
    return doctor.run(_resolver(workdir, devices.local_gpus(os.environ)), os.environ, workdir=workdir)


def _emit(command: Sequence[str], run_flags: Sequence[str]) -> int:
    from distloop.launcher.emit import emit  # which few runs need

    values = flags.FLAGS
    settings: dict[str, Any] = {setting.name: values[setting.name].value for setting in fields(emit_settings.Settings)}
    text = emit(
        values.emit,
        emit_settings.Settings(**settings),
        [values[name].serialize() for name in run_flags if values[name].present],
        command,
        grace_secs=math.ceil(values.grace),
        max_restarts=values.max_restarts,
    )
    print(text, end="")
    return 0


def _default_log_dir(workdir: str | None) -> str:
    return "distloop_logs" if not workdir or "://" in workdir else os.path.join(workdir, "logs")  # noqa: PTH118
