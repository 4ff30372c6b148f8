"""How distloop speaks to the person who started it. Imports no TensorFlow."""

import os
import sys
from typing import TextIO


def say(sentence: str) -> None:
    """Print a sentence that a person must see, whatever becomes of stdout."""
    show(f"distloop: {sentence}")


def show(text: str) -> None:
    """Print lines on stderr, if there is anybody to read them."""
    try:
        start = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
        print(f"{start}{text}", file=sys.stderr, flush=True)
    except OSError:
        close(sys.stderr)


def close(stream: TextIO) -> None:
    """Let nothing more be written: who read it has gone, as `| head` and closed terminals do, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
