"""The command line: flags derived from `RunConfig`, and what the launchers run. The only import of absl."""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from absl import app, flags, logging

from distloop import tasks, workdir
from distloop.config import (
    NotFiniteError,
    PeerLostError,
    PreflightError,
    RunConfig,
    Stopped,
    StorageError,
    UsageError,
)
from distloop.launcher import data_service, error_record
from distloop.say import say


def define_config_flags() -> None:
    """Define one flag for each field of `RunConfig`."""
    for setting in fields(RunConfig):
        define: Callable[..., Any] = flags.DEFINE_string
        if "bool" in str(setting.type):
            define = flags.DEFINE_boolean
        elif "int" in str(setting.type):
            define = flags.DEFINE_integer
        elif "float" in str(setting.type):
            define = flags.DEFINE_float
        _define(define, setting.name, setting.default, setting.metadata["help"])


def train_main() -> None:
    """Run `distloop-train` and `python -m launch.train`: one training process."""
    define_config_flags()
    _run(_train, advice="See --help.")


def export_main() -> None:
    """Run `distloop-export` and `python -m launch.export`: write the model of a run."""
    _define(flags.DEFINE_string, "workdir", None, "folder of the run")
    _define(flags.DEFINE_string, "output", None, "where to write: a new folder, or for keras a file named *.keras")
    _define(flags.DEFINE_string, "format", "saved_model", "saved_model or keras")
    _define(flags.DEFINE_boolean, "best", False, "the best checkpoint of the run (see --best_metric), not the newest")
    _define(flags.DEFINE_boolean, "averaged", False, "the moving averages of the weights (see --ema_momentum)")
    _define(flags.DEFINE_string, "part", None, "name in State of the model to write (default: all, each by its name)")
    _run(_export, advice="See --help.")


def data_service_main() -> None:
    """Run `distloop-data-service` and `python -m launch.data_service`: a tf.data service on this machine."""
    _define(flags.DEFINE_integer, "workers", 2, "number of worker processes; each uses all cores")
    _define(flags.DEFINE_integer, "port", 0, "port of the dispatcher (default: a free one)")
    _define(flags.DEFINE_string, "host", "localhost", "name under which the training processes reach this machine")
    _define(
        flags.DEFINE_string,
        "dispatcher",
        None,
        "address of a dispatcher that runs elsewhere: start workers for it only",
    )
    _run(_serve, advice="See --help.")


def _define(define: Callable[..., Any], name: str, default: Any, help_text: str) -> None:
    define(name, default, help_text)
    # Shown by --help, which lists the flags of the script and not those of the modules it imports.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def _run(main: Callable[[Sequence[str]], int], *, advice: str) -> None:
    """Parse the flags, call `main(arguments)` and exit; an end that is no error of the code is one sentence."""
    # The stacks of all threads for the supervisor, also while `silence` has stderr.
    faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=True)

    def parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_end_by(UsageError(f"{str(error).rstrip('.')}. {advice}")))

    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv[1:])
        except KeyboardInterrupt:
            say("interrupted; the same command goes on from the last checkpoint.")
            return 128 + signal.SIGINT
        except Exception as error:
            return _end_by(error)

    app.run(guarded, flags_parser=parse)


def _end_by(error: Exception) -> int:
    """Tell the supervisor and the person why this process ends; return the exit code, or raise an error of the code."""
    if not isinstance(error, Stopped):
        error_record.hand_over(error_record.describe(error, phase="setup", step=0))
    if not isinstance(error, UsageError | NotFiniteError | PreflightError | PeerLostError | Stopped | StorageError):
        raise error
    say(str(error))
    if isinstance(error, PeerLostError):
        sys.stdout.flush()
        os._exit(error.exit_code)  # ending TensorFlow properly without its peers takes seconds
    return error.exit_code


def _train(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; settings are flags, such as --epochs=5: see --help.")
    settings: dict[str, Any] = {setting.name: flags.FLAGS[setting.name].value for setting in fields(RunConfig)}
    config = RunConfig(**settings)
    with silence():  # a remote workdir loads TensorFlow
        workdir.check(config)
    if "" not in sys.path:
        sys.path.insert(0, "")  # so that a console script finds the user's task as `python -m` does
    tasks.find(config.task)
    with silence():
        from distloop.experiment import train
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TensorFlow, when it loads, sets INFO
    train(config.task, config)
    return 0


def _export(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; expected flags: see --help.")
    settings: dict[str, Any] = {
        name: flags.FLAGS[name].value for name in ("workdir", "output", "format", "best", "averaged", "part")
    }
    for name in ("workdir", "output"):
        if not settings[name]:
            raise UsageError(f"{name} is not given; expected --workdir=RUN --output=NEW_PATH.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with silence():
        from distloop.serving import export
    for path in export(**settings):
        print(path)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; settings are flags, such as --workers=4: see --help.")
    values = flags.FLAGS
    return data_service.run(workers=values.workers, port=values.port, host=values.host, dispatcher=values.dispatcher)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hold back what TensorFlow's C++ code writes to stderr while it loads; show it if loading fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
