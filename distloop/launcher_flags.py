"""The command line of the launcher; imports little, so that it starts fast: the standard library and absl.flags."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from distloop.config import PreflightError, UsageError
from distloop.launcher import plan, supervisor, watchdog
from distloop.launcher.fault import parse_faults
from distloop.launcher.logs import say
from distloop.launcher.processes import free_ports
from distloop.launcher.topology import Place, Topology

_EXAMPLE = "python -m launch.run --workers=2 -- python -m launch.train --task=mnist_cnn --workdir=runs/two"


def run_main() -> None:
    """Run `distloop-run` and `python -m launch.run`: supervise a command in one or several processes."""
    define = _definer()
    define(flags.DEFINE_string, "workers", "1", "worker processes a host, or per_gpu; one process drives all GPUs")
    define(flags.DEFINE_string, "log_dir", None, "folder of the logs (default: logs in the --workdir of the command)")
    define(flags.DEFINE_enum, "console", "chief", "whose output to show", enum_values=supervisor.CONSOLES)
    define(flags.DEFINE_integer, "max_restarts", 3, "restarts in a row without a new checkpoint")
    define(flags.DEFINE_float, "grace", 30.0, "seconds for all workers to stop with a checkpoint, after SIGTERM")
    define(
        flags.DEFINE_string, "hang_timeout", "", "PHASE:SECONDS,...: limits without progress, in place of learned ones"
    )
    define(flags.DEFINE_string, "fault", "", "RANK:STEP:KIND,...: rehearse a fault, the first in the first attempt")
    define(flags.DEFINE_string, "report", None, "file that gets the cause of a failure, too")
    define(flags.DEFINE_boolean, "dry_run", False, "print the commands of this host's workers and start nothing")
    _run(_supervise)


def _definer() -> Callable[..., None]:
    def define(kind: Callable[..., Any], name: str, default: Any, help_text: str, **more: Any) -> None:
        values = {"help": help_text, **more}
        kind(name, default, **values)
        # Shown by --help, which lists the flags of the script and not those of the modules it imports.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    return define


def _run(main: Callable[[Sequence[str]], int]) -> None:
    """Parse the flags before `--`, call `main(command)` with what follows, and exit."""
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", allow_hide_cpp=True)
    own, command = _split(sys.argv)
    try:
        rest = flags.FLAGS(own)
        if flags.FLAGS.help:
            print(f"{_EXAMPLE}\n\n{flags.FLAGS.main_module_help()}")
            sys.exit(0)
        if rest[1:]:
            raise UsageError(f"unexpected argument {rest[1]!r}; the command goes behind --, as in {_EXAMPLE}.")
        sys.exit(main(command))
    except flags.Error as error:
        say(f"{str(error).rstrip('.')}. See --help.")
        sys.exit(UsageError.exit_code)
    except (UsageError, PreflightError) as error:
        say(str(error))
        sys.exit(error.exit_code)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


def _supervise(command: Sequence[str]) -> int:
    if not command:
        raise UsageError(f"there is no command; expected one behind --, as in {_EXAMPLE}.")
    values = flags.FLAGS
    settings = supervisor.Settings(
        log_dir=Path(values.log_dir or _default_log_dir(command)),
        console=values.console,
        max_restarts=values.max_restarts,
        grace_secs=values.grace,
        hang_limits=watchdog.parse_limits(values.hang_timeout),
        faults=parse_faults(values.fault),
        report=Path(values.report) if values.report else None,
    )

    def make_plan() -> list[plan.Worker]:
        topology = Topology((Place("127.0.0.1", tuple(free_ports(int(values.workers)))),))
        return plan.make_plan(topology, command)

    if values.dry_run:
        print(*map(plan.shell_line, make_plan()), sep="\n")
        return 0
    return supervisor.supervise(make_plan, settings, others_elsewhere=False)


def _default_log_dir(command: Sequence[str]) -> str:
    workdir = _flag_of(command, "workdir")
    return "distloop_logs" if workdir is None or "://" in workdir else os.path.join(workdir, "logs")  # noqa: PTH118


def _flag_of(command: Sequence[str], name: str) -> str | None:
    """Return the value of a flag in a command, the last one given."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, given, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag == name:
            found = value if given else following
    return found
