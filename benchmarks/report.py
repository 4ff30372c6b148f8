"""Write a report of records: report.md, one page report.html that needs nothing else, and its figures as PNGs.

`python -m benchmarks.report RUNS... [--output=DIR] [--export=mllog,tf_cnn,tensorboard]`
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


def main() -> None:
    """Run `python -m benchmarks.report`."""
    command.define(flags.DEFINE_string, "output", "report", "folder of the report")
    command.define(flags.DEFINE_list, "export", [], f"other formats to write, too: {', '.join(exports.FORMATS)}")
    command.run(lambda arguments: report(arguments, Path(flags.FLAGS.output), flags.FLAGS.export))


def report(runs: Sequence[str], output: Path, formats: Sequence[str]) -> int:
    """Write the report of the records in files and folders; return 0. Raises UsageError."""
    if not runs:
        raise UsageError("no records are given; expected python -m benchmarks.report RUNS..., files or folders.")
    exports.check(formats)
    found = read(Path(run) for run in runs)
    sections = make_sections(found)
    output.mkdir(parents=True, exist_ok=True)
    for image in (image for section in sections for image in section.images):
        (output / f"{image.name}.png").write_bytes(image.png)
    (output / "report.md").write_text(to_markdown(sections))
    (output / "report.html").write_text(to_html(sections))
    exports.write(found, output, formats)
    print(output / "report.html")
    return 0


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records in files and folders, each with its `file`. Raises UsageError if nothing was measured."""
    files = dict.fromkeys(file for path in paths for file in (sorted(path.glob("*.jsonl")) or [path]))
    found = [{**record, "file": str(file)} for file in files for record in records.read([file])]
    if not any(record["kind"] in ("result", "comm_point") for record in found):
        raise UsageError(f"{', '.join(map(str, files))}: no result in there; expected records of a run that has ended.")
    return found


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
    main()
