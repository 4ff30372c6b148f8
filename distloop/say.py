"""How distloop speaks to the person who started it. Imports no TensorFlow."""

import sys


def say(sentence: str) -> None:
    """Print a sentence that a person must see, whatever becomes of stdout."""
    print(f"distloop: {sentence}", file=sys.stderr, flush=True)
