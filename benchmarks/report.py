"""Write a report of records: report.md, one page report.html that needs nothing else, and its figures as PNGs.

`python -m benchmarks.report RUNS... [--output=DIR] [--mllog] [--tf_cnn] [--tensorboard]`
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from absl import flags
from markupsafe import Markup

from benchmarks import command, exports, records
from benchmarks.sections import Section, make_sections
from distloop.errors import UsageError


def define_flags() -> None:
    """Define the flags of the command."""
    define = command.define
    define(flags.DEFINE_string, "output", "report", "folder of the report")
    define(flags.DEFINE_boolean, "mllog", False, "write mllog.txt, too: the events of each launch as MLPerf logs them")
    define(flags.DEFINE_boolean, "tf_cnn", False, "write tf_cnn, too: the console lines of tf_cnn_benchmarks by launch")
    define(
        flags.DEFINE_boolean, "tensorboard", False, "write tensorboard, too: scalars and one HParams session a result"
    )


def main(arguments: Sequence[str]) -> int:
    """Write the report of the records in files and folders, and other formats if asked to."""
    if not arguments:
        raise UsageError("no records are given; expected python -m benchmarks.report RUNS..., files or folders.")
    values = flags.FLAGS
    output = Path(values.output)
    found = read(map(Path, arguments))
    write(make_sections(found), output)
    if values.mllog:
        (output / "mllog.txt").write_text("".join(f"{line}\n" for line in exports.mllog_lines(found)))
    if values.tf_cnn:
        (output / "tf_cnn").mkdir(exist_ok=True)
        for launch, log in exports.tf_cnn_logs(found):
            (output / "tf_cnn" / f"{launch}.log").write_text(log)
    if values.tensorboard:
        exports.write_tensorboard(found, output / "tensorboard")
    print(output / "report.html")
    return 0


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records, each with its `file` and `line`. Raises UsageError if nothing was measured."""
    files = dict.fromkeys(file for path in paths for file in (sorted(path.glob("*.jsonl")) or [path]))
    found = [
        {**record, "file": str(file), "line": line}
        for file in files
        for line, record in enumerate(records.read([file]), 1)
    ]
    if not any(record["kind"] in ("result", "comm_point") for record in found):
        raise UsageError(f"{', '.join(map(str, files))}: no result in there; expected records of a run that has ended.")
    return found


def write(sections: Sequence[Section], folder: Path) -> None:
    """Write report.md, report.html and the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in (image for section in sections for image in section.images):
        (folder / f"{image.name}.png").write_bytes(image.png)
    (folder / "report.md").write_text(to_markdown(sections))
    (folder / "report.html").write_text(to_html(sections))


def to_html(sections: Sequence[Section]) -> str:
    """Return the page."""
    return _templates(autoescape=True).get_template("page.html.jinja").render(sections=sections)


def to_markdown(sections: Sequence[Section]) -> str:
    """Return the report as GitHub's Markdown; its images are the PNGs beside it."""
    environment = _templates(finalize=_as_markdown, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.md.jinja").render(sections=sections, Markup=Markup)


def _templates(**options: Any) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, **options
    )


def _as_markdown(value: Any) -> str:
    """Return text for one line of Markdown, in which nothing is markup."""
    if isinstance(value, Markup):
        return str(value)
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#~!])", r"\\\1", text)


if __name__ == "__main__":
    define_flags()
    command.run(main)
