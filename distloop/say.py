"""How distloop speaks to the person who started it. Imports no TensorFlow."""

import sys


def say(sentence: str) -> None:
    """Print a sentence that a person must see, whatever becomes of stdout."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
    print(f"{start}distloop: {sentence}", file=sys.stderr, flush=True)
