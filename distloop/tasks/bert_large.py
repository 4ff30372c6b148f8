"""The large BERT: everything is as in bert_base but for its size."""

from distloop import RunConfig, Task
from distloop.tasks import bert_base


def make_task(
    config: RunConfig,
    *,
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    vocabulary: int = 30522,
    length: int = 128,
    predictions: int = 20,
    dropout: float = 0.1,
    examples: int = 16384,
) -> Task:
    """Pretrain on the records in `config.data_dir`, or on `examples` made-up ones; lengths are in tokens."""
    return bert_base.make_task(
        config,
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        length=length,
        predictions=predictions,
        dropout=dropout,
        examples=examples,
    )
