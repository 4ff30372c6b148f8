"""The medium GPT-2, as a decoder of 350 M parameters is mostly made: everything is as in gpt2_124m but for its size."""

from distloop import RunConfig, Task
from distloop.tasks import gpt2_124m


def make_task(
    config: RunConfig,
    *,
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    vocabulary: int = 50257,
    length: int = 1024,
    dropout: float = 0.1,
    examples: int = 4096,
) -> Task:
    """Predict the next token with AdamW: the texts of `config.dataset`, or `examples` made-up sequences."""
    return gpt2_124m.make_task(
        config,
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        length=length,
        dropout=dropout,
        examples=examples,
    )
