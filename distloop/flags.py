"""The command line: flags derived from `RunConfig`, and what the launchers run. The only import of absl."""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from absl import app, flags, logging

from distloop import cluster, storage, tasks, workdir
from distloop.config import RunConfig
from distloop.errors import NotFiniteError, PeerLostError, PreflightError, Stopped, StorageError, UsageError
from distloop.launcher import data_service, error_record
from distloop.say import say

_LOOK_SECS = 0.5  # how often a follower looks whether the run has begun


def define_config_flags(but: Sequence[str] = ()) -> None:
    """Define one flag for each field of `RunConfig` that is not in `but`."""
    for setting in fields(RunConfig):
        if setting.name in but:
            continue
        define: Callable[..., Any] = flags.DEFINE_string
        if setting.type in ("bool | str", bool | str):
            define = _define_on_off_auto
        elif "bool" in str(setting.type):
            define = flags.DEFINE_boolean
        elif "int" in str(setting.type):
            define = flags.DEFINE_integer
        elif "float" in str(setting.type):
            define = flags.DEFINE_float
        _define(define, setting.name, setting.default, setting.metadata["help"])


class _OnOffAuto(flags.BooleanParser):
    def parse(self, argument: Any) -> Any:
        return argument if argument == "auto" else super().parse(argument)


def _define_on_off_auto(name: str, default: Any, help_text: str) -> None:
    flags.DEFINE_flag(flags.Flag(_OnOffAuto(), None, name, default, help_text, boolean=True))


def train_main() -> None:
    """Run `distloop-train` and `python -m launch.train`: one training process."""
    define_config_flags()
    _run(_train, advice="See --help.")


def evaluate_main() -> None:
    """Run `distloop-evaluate` and `python -m launch.evaluate`: checkpoints of a run, with the run's settings."""
    define_config_flags()
    _define(flags.DEFINE_string, "checkpoint", "newest", "which one: newest, best (see --best_metric) or its step")
    _define(flags.DEFINE_boolean, "follow", False, "each one as it appears, until the run is finished")
    _run(_evaluate, advice="See --help.")


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
    _refuse(arguments)
    settings: dict[str, Any] = {setting.name: flags.FLAGS[setting.name].value for setting in fields(RunConfig)}
    config = RunConfig(**settings)
    if cluster.from_tf_config(os.environ.get("TF_CONFIG")).is_evaluator:
        return _follow()
    with silence():  # a remote workdir loads TensorFlow
        workdir.check(config)
    _make_importable()
    tasks.find(config.task)
    with silence():
        from distloop.experiment import train
    _quiet_log()
    train(config.task, config)
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    _refuse(arguments)
    values = flags.FLAGS
    if values.follow:
        return _follow()
    which = values.checkpoint
    if which not in ("newest", "best") and not which.isdecimal():
        raise UsageError(f"checkpoint is {which!r}; expected newest, best or a step, such as 400.")
    config = _settings_of_run()
    _make_importable()
    tasks.find(config.task)
    with silence():
        from distloop.console import Display
        from distloop.evaluation import evaluate_checkpoint
    _quiet_log()
    step, found = evaluate_checkpoint(config.task, config, int(which) if which.isdecimal() else which)
    Display(enabled=True).table({f"step {step}": found.metrics})
    print(json.dumps({"step": step, **workdir.finite(found.metrics)}))
    return 0


def _follow() -> int:
    """Evaluate checkpoints beside the run of --workdir, which may not have begun."""
    os.environ.pop("TF_CONFIG", None)  # no strategy may look for the cluster, of which this process is no part
    config = _settings_of_run(waits=True)
    _make_importable()
    tasks.find(config.task)
    with silence():
        from distloop.evaluation import follow
    _quiet_log()
    follow(config.task, config)
    return 0


def _settings_of_run(*, waits: bool = False) -> RunConfig:
    """Return the settings of the run in --workdir, changed by the flags that were given; `waits` for its beginning."""
    values = {setting.name: flags.FLAGS[setting.name] for setting in fields(RunConfig)}
    folder = values.pop("workdir").value
    if not folder:
        raise UsageError("workdir is not given; expected the folder of a run, such as --workdir=runs/first.")
    with silence():  # a remote workdir loads TensorFlow
        while waits and not (storage.as_path(folder) / "config.json").exists():
            time.sleep(_LOOK_SECS)
        return workdir.config_of(folder, **{name: flag.value for name, flag in values.items() if flag.present})


def _refuse(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"unexpected argument {arguments[0]!r}; settings are flags, such as --workdir=runs/first: see --help."
        )


def _make_importable() -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")  # so that a console script finds the user's task as `python -m` does


def _quiet_log() -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TensorFlow, when it loads, sets INFO


def _export(arguments: Sequence[str]) -> int:
    _refuse(arguments)
    settings: dict[str, Any] = {
        name: flags.FLAGS[name].value for name in ("workdir", "output", "format", "best", "averaged", "part")
    }
    for name in ("workdir", "output"):
        if not settings[name]:
            raise UsageError(f"{name} is not given; expected --workdir=RUN --output=NEW_PATH.")
    _make_importable()
    with silence():
        from distloop.serving import export
    for path in export(**settings):
        print(path)
    return 0


def _serve(arguments: Sequence[str]) -> int:
    _refuse(arguments)
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
