"""How a benchmark command takes its flags and ends. The only import of absl here."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from distloop.errors import UsageError
from distloop.say import say


def define(kind: Callable[..., Any], name: str, default: Any, help_text: str, **more: Any) -> None:
    """Define a flag that --help shows: `define(flags.DEFINE_integer, "launches", 5, "...")`."""
    kind(name, default=default, help=help_text, **more)
    # --help lists the flags of the script and not those of the modules it imports.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def run(main: Callable[[list[str]], int]) -> None:
    """Parse the flags, call `main(arguments)` and exit with its code; what the user can mend is one sentence."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            say(f"{str(error).rstrip('.')}. See --help.")
            sys.exit(UsageError.exit_code)

    def guarded(argv: list[str]) -> int:
        try:
            return main(argv[1:])
        except UsageError as error:
            say(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            say("interrupted.")
            return 128 + signal.SIGINT

    # So that what this process has started ends with it, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app.run(guarded, flags_parser=parse)
