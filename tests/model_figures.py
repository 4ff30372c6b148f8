"""The figures of docs/benchmarks/model.md: what the scaling model makes of the published tables.

python -m tests.model_figures     writes them anew into the page
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import explained, fitting, published
from benchmarks.fitting import Point

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "model.md"
_BLOCK = re.compile(r"(?<=<!-- python -m tests.model_figures -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """The points of a published table, with the name of its row in the page."""

    title: str
    points: list[Point]


def points(rows, size, up_to=10**9):
    """Return the points of published rows, of at most `up_to` devices."""
    return [
        Point(r.config, r.devices, r.hosts, r.per_replica_batch, size, r.devices * r.per_replica_batch / r.throughput)
        for r in rows
        if r.devices <= up_to
    ]


def tables() -> Iterator[Table]:
    """Return the tables that the model is to explain, then those that it must not."""
    bert, resnet = published.BERT_BASE_BYTES, published.RESNET50_BYTES
    yield Table("TF 2.3 BERT-Base, 10 configurations, V100", points(published.BERT_BASE, bert))
    yield Table("Horovod BERT-Base, V100", points(published.HOROVOD, bert))
    yield Table("PyTorch BERT-Base, V100", points(published.PYTORCH, bert))
    yield Table("Megatron GPT 0.5 B, V100", points(published.MEGATRON, published.MEGATRON_BYTES))
    for rows in published.BERT_LARGE:
        yield Table(f"NVIDIA BERT-Large {rows[0].config}, A100", points(rows, published.BERT_LARGE_BYTES))
    for rows in published.MAXTEXT:
        yield Table(f"MaxText {rows[0].config}, pods of 256 TPU v5e", points(rows, 1e9))
    yield Table("tf_cnn ResNet-50, K80", points(published.K80_RESNET50, resnet))
    yield Table("tf_cnn InceptionV3, K80", points(published.K80_INCEPTION3, published.INCEPTION3_BYTES))
    for config in sorted({row.config for row in published.RESNET50_PEERS}):
        own = [row for row in published.RESNET50_PEERS if row.config == config]
        yield Table(f"ResNet-50 {config}, V100", points(own, resnet))
    yield Table("TF 2.3 ResNet-50 fp32, V100", points(published.RESNET50_FP32, resnet))
    yield Table("InceptionV3, p2.8xlarge", points(published.P2_8XLARGE, published.INCEPTION3_BYTES))
    yield Table("InceptionV3, Piz Daint to 64", points(published.DAINT_SYNTHETIC, published.INCEPTION3_BYTES, 64))
    yield Table("InceptionV3, Piz Daint to 128", points(published.DAINT_SYNTHETIC, published.INCEPTION3_BYTES))
    yield Table("InceptionV3, p2.xlarge", points(published.P2_XLARGE, published.INCEPTION3_BYTES))
    yield Table("TF 2.3 ResNet-50 fp16, V100", points(published.RESNET50_FP16, resnet))


def held_out(given: list[Point], part: int) -> list[tuple[float, bool]]:
    """Return, for the largest size told by those of at most 1 / `part` of it, the errors and whether in the band."""
    largest = max(p.devices for p in given)
    smaller = [p for p in given if p.devices * part <= largest]
    if len({p.hosts for p in smaller}) < 2:
        return []
    found = fitting.fit(smaller)
    told = [
        (fitting.predict(found, p.config or "", p.devices, p.hosts, p.batch, p.size), p)
        for p in given
        if p.devices == largest
    ]
    return [(one.seconds / p.seconds - 1, one.low <= p.seconds <= one.high) for one, p in told]


def figures() -> str:
    """Return the table of the page."""
    lines = [
        "| table | largest | mean error | worst | of a half | of a quarter | says |",
        "| --- | --: | --: | --: | --: | --: | --- |",
    ]
    within = []
    for title, given in tables():
        known = explained.explain(given)
        whole = fitting.fit(given)
        cells = [f"{whole.mean_error:.1%}", f"{np.max(np.abs(whole.errors)):.1%}"]
        for part in (2, 4):
            errors = held_out(given, part) if known.status == explained.FITS else []
            within += [inside for _, inside in errors]
            cells.append(", ".join(f"{error:+.1%}" for error, _ in errors) or "")
        lines.append(f"| {title} | {whole.largest} | {' | '.join(cells)} | {known.status} |")
    lines.append("")
    lines.append(
        f"Of {len(within)} sizes that were held out, {sum(within)} are within the 95 % band of the smaller ones."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the figures into the page."""
    PAGE.write_text(_BLOCK.sub(lambda _: figures(), PAGE.read_text()))


def of_page() -> str:
    """Return the figures that are in the page."""
    found = _BLOCK.search(PAGE.read_text())
    return found[0] if found else ""


if __name__ == "__main__":
    main()
