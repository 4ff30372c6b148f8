"""The report says what the records say, fetches nothing, and never shows a missing value as a number."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks import plots, report
from benchmarks.cases import Case
from benchmarks.growth import growths
from benchmarks.sections import make_sections
from distloop.errors import UsageError
from tests import bench_records, harness

HOSTILE = "<script>alert(1)</script> | `x` **b** [a](http://example.com) $\\frac{1}$ & --> \" '"
# What a number in a row is, in a record: by table and column; None where the record has none.
COLUMNS = {
    "Speed": {
        "replicas": lambda r: [r["case"]["workers"] * r["case"]["replicas"]],
        "batch a replica": lambda r: [r["case"]["per_replica_batch"]],
        "throughput": lambda r: interval_of(r["throughput"]),
        "per device": lambda r: [r["per_device"]],
        "efficiency": lambda r: [100 * r["efficiency"]["value"], 1] if r["efficiency"] else [None],
        "step, ms": lambda r: interval_of(r["step_ms"]),
        "exposed comm., ms": lambda r: [part(r, "comm_exposed")],
        "start-up, s": lambda r: [sum(r["startup_s"].values()) if r["startup_s"] else None],
    },
    "Where a step goes": {
        **{
            name: lambda r, key=key: [part(r, key)]
            for name, key in {
                "compute": "compute",
                "exposed communication": "comm_exposed",
                "input wait": "input_wait",
                "host gap": "host_gap",
                "optimizer": "optimizer",
            }.items()
        },
        "p5": lambda r: [r["step_ms"]["p5"]],
        "p99": lambda r: [r["step_ms"]["p99"]],
        "cv": lambda r: [100 * r["step_ms"]["cv"]],
    },
    "Peers on mnist_cnn, step, 4 replicas": {
        "throughput": lambda r: interval_of(r["throughput"]),
        "lead of distloop": lambda r: lead(r),
        "loss": lambda r: [1.871, 2] if r["losses"] else [None],
    },
    "Start-up": {
        name: lambda r, key=name: [r["startup_s"][key.replace(" ", "_")]] for name in ("import", "first step")
    },
    "All-reduce": {
        "bytes": lambda r: [r["bytes"]],
        "time": lambda r: interval_of({name: 1e3 * r["seconds"][name] for name in ("median", "low", "high")}),
        "algorithm bandwidth": lambda r: [r["algbw"] / 1e9],
        "bus bandwidth": lambda r: [r["busbw"] / 1e9],
    },
    "Fits": {"points": lambda r: [r["points"]]},
}


def interval_of(interval):
    return [interval[name] for name in ("median", "low", "high")] if interval else [None]


def lead(result):
    peer = result["case"]["peer"]
    if peer == "distloop" or result["error"]:
        return [None]
    times = bench_records.PEER_SPEEDS["distloop"] / bench_records.PEER_SPEEDS[peer]
    return [times]  # its interval is that of `statistics.ratio`


def part(result, name):
    return (result["breakdown_ms"] or {}).get(name)


class Page(html.parser.HTMLParser):
    """The tables, tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.attributes, self.text = [], [], [], ""
        self.open, self.title = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "h3":
            self.open, self.title = "title", ""
        elif tag == "table":
            self.tables.append((self.title, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.open = "cell"
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        if tag in ("h3", "td", "th"):
            self.open = ""

    def handle_data(self, data):
        self.text += data
        if self.open == "title":
            self.title += data
        elif self.open == "cell":
            self.tables[-1][1][-1][-1] += data


def tables_of_markdown(text):
    found = []
    for block in re.findall(r"### (.*?)\n\n.*?\n\n((?:\|.*\n)+)", text):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block[1].splitlines()]
        found.append((block[0], [[cell.strip() for cell in row] for row in [rows[0], *rows[2:]]]))
    return found


def numbers(cell):
    """Return the numbers of a cell, None for a dash."""
    found = re.findall(r"—|(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", cell)
    return [None if text == "—" else float(text.replace(",", "")) for text in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The records and the report of two invocations, on two machines."""
    folder = tmp_path_factory.mktemp("report")
    bench_records.write(folder / "gpu.jsonl", bench_records.on_gpus())
    bench_records.write(folder / "cpu.jsonl", bench_records.on_cpu())
    arguments = ["-m", "benchmarks.report", "gpu.jsonl", "cpu.jsonl", "--output=out"]
    code, out, err = harness.run(*arguments, "--mllog", "--tf_cnn", "--tensorboard", cwd=folder)
    assert code == 0, err
    assert out == "out/report.html\n"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "out" / "report.html").read_text())


def record_of(folder, cell):
    """Return the record that the last cell of a row names."""
    run, file, line = re.fullmatch(r"(\w+)\W+(\S+?):(\d+)\)?", cell.strip()).groups()
    record = json.loads((folder / file).read_text().splitlines()[int(line) - 1])
    assert record["run"] == run
    return record


@pytest.mark.parametrize("form", ["html", "md"])
def test_every_number_is_that_of_the_record_which_its_row_names(folder, page, form):
    tables = page.tables if form == "html" else tables_of_markdown((folder / "out" / "report.md").read_text())
    assert {title for title, _ in tables} == set(COLUMNS)
    seen = []
    for title, (columns, *rows) in tables:
        for row in rows:
            record = record_of(folder, row[-1])
            seen.append((title, record["run"], record.get("key"), record.get("bytes"), record.get("model")))
            for name, expected in COLUMNS[title].items():
                shown = numbers(row[columns.index(name)])
                wanted = expected(record)
                assert len(shown) >= len(wanted), (title, name, row)
                for value, number in zip(wanted, shown, strict=False):
                    assert (value is None) == (number is None), (title, name, row)
                    assert value is None or number == pytest.approx(value, rel=6e-4, abs=0.051 * (name == "efficiency"))
    results = [r for r in bench_records.on_gpus() + bench_records.on_cpu() if r["kind"] == "result"]
    assert len(seen) == len(set(seen))
    assert {key for title, _, key, *_ in seen if title == "Speed"} == {
        r["key"] for r in results if r["case"]["mode"] != "comm"
    }


def test_what_is_missing_says_so_and_why(folder, page):
    speed = [rows for title, rows in page.tables if title == "Speed"]
    columns, *rows = [row for table in speed for row in table]
    on_cpu = next(row for row in rows if "cpu.jsonl" in row[-1])
    assert on_cpu[columns.index("MFU")] == "— no peak known of CPU"
    assert on_cpu[columns.index("exposed comm., ms")] == on_cpu[columns.index("input wait, ms")] == "—"
    assert "device not told" in on_cpu[columns.index("memory")]
    failed = next(row for row in rows if "Orbit" in row)
    assert bench_records.PEER_ERROR in failed[columns.index("throughput")]
    assert all(cell == "—" for cell in failed[columns.index("per device") : -1])


def test_the_page_says_what_was_measured_where_and_what_to_try(folder, page):
    markdown = (folder / "out" / "report.md").read_text()
    for text in (page.text, markdown.replace("\\", "")):
        for fact in ("4 x NVIDIA H200", "AMD EPYC 9654", "tensorflow 2.21.0", "0a1b2c3d4e5f", "TF_GPU_THREAD_MODE"):
            assert fact in text
        assert "python -m benchmarks.run --workload=resnet50 --mode=sweep" in text
        assert "communication-bound: 15.5 of 108 ms a step. " in text
        assert "a larger batch a replica or --micro_batches exchanges less often" in text
        assert "9,480" in text
        assert "the processor's governor is powersave" in text
        assert "989 TFLOP/s a device (H200 bf16)" in text


def test_environments_are_never_in_one_table_or_figure(folder, page):
    for _, (_, *rows) in page.tables:
        assert len({record_of(folder, row[-1])["run"] for row in rows}) == 1
    names = [path.stem for path in (folder / "out").glob("*.png")]
    assert all(name.endswith((bench_records.GPU, bench_records.CPU)) for name in names)
    assert "Numbers of different environments are not to be compared." in page.text


def test_runs_of_one_environment_are_in_one_section(tmp_path):
    for run, batch in {"first": 64, "second": 128}.items():
        case = Case("mnist_cnn", per_replica_batch=batch)
        lines = [*bench_records.launches_of(case, run=run), bench_records.result(case, 1000.0, run=run)]
        bench_records.write(tmp_path / f"{run}.jsonl", [bench_records.env(run=run), *lines])
    (section,) = make_sections(report.read([tmp_path]))
    assert len(section.tables[0].rows) == 2


def test_the_page_fetches_nothing(page):
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith(("#", "data:,")), (tag, name, value)
        if name in ("style", "clip-path", "fill", "filter"):
            assert "url(" not in value or "url(#" in value
    assert page.text.count("url(") == page.text.count("url(#")
    assert "@import" not in page.text


def test_figures_are_images_of_sensible_size_and_follow_the_colour_of_the_text(folder):
    text = (folder / "out" / "report.html").read_text()
    markdown = (folder / "out" / "report.md").read_text()
    pngs = list((folder / "out").glob("*.png"))
    assert len(pngs) == 6 == text.count("</svg>")
    assert plots._INK not in text
    assert text.count("currentColor") > 100
    for path in pngs:
        assert f"]({path.name})" in markdown
        image = Image.open(io.BytesIO(path.read_bytes()))
        assert 900 <= image.width <= 1400
        assert 300 <= image.height <= 1400
        assert len(image.convert("RGB").getcolors(2**20)) > 20


def test_names_are_text_and_nothing_else(tmp_path):
    case = Case(HOSTILE, settings={"task_args": HOSTILE}, replicas=2)
    peer = Case(HOSTILE, settings={"task_args": HOSTILE}, replicas=2, peer="fit")
    single = Case(HOSTILE, settings={"task_args": HOSTILE})
    lines = [bench_records.env(device=HOSTILE, versions={HOSTILE: HOSTILE}, environment={HOSTILE: HOSTILE})]
    lines[0]["hardware"]["device"] = HOSTILE
    lines += bench_records.launches_of(case)
    lines += [bench_records.result(single, 50.0, unit=HOSTILE), bench_records.failed(peer, HOSTILE)]
    lines += [bench_records.result(case, 100.0, unit=HOSTILE, warnings=[HOSTILE])]
    lines += [bench_records.verdict(case, "input", HOSTILE, HOSTILE)]
    found = report.read([bench_records.write(tmp_path / "<b>&`records.jsonl", lines)])
    sections = make_sections(found)
    page = Page(report.to_html(sections))
    assert not {"script", "a", "b"} & set(page.tags)
    assert page.text.count(HOSTILE) > 10
    assert "<b>&`records.jsonl" in page.text
    assert not [value for _, name, value in page.attributes if name.startswith("on") or value == "http://example.com"]
    markdown = report.to_markdown(sections)
    body = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert not re.search(r"<|(?<!\\)`|(?<!\\)\[a", body)
    for _, rows in tables_of_markdown(markdown):
        assert len({len(row) for row in rows}) == 1
    report.write(sections, tmp_path / "out")
    assert all(re.fullmatch(r"[a-z0-9-]+\.png|report\.(md|html)", path.name) for path in (tmp_path / "out").iterdir())


def of_kind(kind, lines=None):
    return [line for line in lines or bench_records.on_gpus() if line["kind"] == kind]


def points_of(axes):
    """Return the points with bars of a figure, and their bars."""
    found = []
    for container in axes.containers:
        line, _, bars = container.lines
        found += zip(
            line.get_xydata().tolist(), np.concatenate([bar.get_segments() for bar in bars]).tolist(), strict=True
        )
    return found


def test_the_throughput_figure_has_points_with_intervals_and_the_ideal_line():
    sweep = [r for r in of_kind("result") if r["case"]["workload"] == "resnet50" and r["case"]["mode"] == "step"]
    curve = [[1, 1400.0], [8, 9400.0]]
    (axes,) = plots.throughput("t", {"a": sweep}, {"a": curve}).axes
    for result, (point, bar) in zip(sweep, points_of(axes), strict=True):
        rate, replicas = result["throughput"], result["case"]["workers"] * result["case"]["replicas"]
        assert point == [replicas, rate["median"]]
        assert bar == [[replicas, pytest.approx(rate["low"])], [replicas, pytest.approx(rate["high"])]]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert [[0, 0], [8, 8 * 1410.0]] in lines
    assert curve in lines
    assert axes.get_xlabel() == "replicas"
    assert axes.get_ylabel() == "images a second"


def test_a_series_that_differs_by_one_number_is_drawn_against_it():
    def found(rate, batch=64, **settings):
        return bench_records.result(Case("null", per_replica_batch=batch, settings=settings), rate)

    by_size = [found(1000.0 / size, task_args=f"gradient_bytes={size},flops=1") for size in (1000, 100, 10)]
    others = [found(900.0, batch=128), found(800.0, jit_compile=True), found(950.0), found(950.0, batch=32)]
    by_batch, growth = sorted(growths([*others, *by_size]))
    assert (by_batch.number, by_batch.fixed) == ("batch a replica", "distloop, 1 replica")
    assert (growth.number, growth.fixed) == ("gradient_bytes", "distloop, 1 replica, batch a replica 64, flops 1")
    (axes,) = plots.growth("t", [growth]).axes
    assert [point for point, _ in points_of(axes)] == [[size, pytest.approx(64 * size)] for size in (10, 100, 1000)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gradient_bytes", "ms a step")


def test_the_bars_of_a_step_are_its_parts_and_those_not_measured_are_named():
    whole = next(r for r in of_kind("result") if r["case"]["mode"] == "e2e")
    partly = next(r for r in of_kind("result", bench_records.on_cpu()))
    (axes,) = plots.step_time("t", [("whole", whole), ("partly", partly)]).axes
    count = len(plots.PARTS)
    widths = [bar.get_width() for bar in axes.patches[: 2 * count]]
    for result, shown in ((whole, widths[:count]), (partly, widths[count:])):
        assert sum(shown) == pytest.approx(result["step_ms"]["median"])
        assert shown == [pytest.approx(result["breakdown_ms"].get(name) or 0) for name in plots.PARTS]
    texts = [text.get_text() for text in axes.texts]
    assert "partly (input wait, optimizer not measured)" in texts


def test_peers_are_relative_to_the_hand_written_loop_and_the_failed_have_their_error():
    results = [r for r in of_kind("result") if r["case"]["workload"] == "mnist_cnn"]
    (axes,) = plots.peers("t", results).axes
    ratios = {
        name.get_text(): point[0] for name, (point, _) in zip(axes.get_yticklabels(), points_of(axes), strict=False)
    }
    assert ratios["hand-written loop"] == 1
    assert ratios["Keras fit"] == pytest.approx(30100 / 41000)
    assert len(ratios) == 5
    assert [text.get_text() for text in axes.texts] == [f"failed: {bench_records.PEER_ERROR}"]


def test_the_bandwidth_figure_has_the_interval_of_the_time_turned_over():
    points = of_kind("comm_point")
    (axes,) = plots.bus_bandwidth("t", {"a": points}, {}).axes
    for record, (point, (low, high)) in zip(points, points_of(axes), strict=True):
        share = record["bytes"] * 2 * 7 / 8
        assert point == [record["bytes"], record["busbw"]]
        assert low[1] == pytest.approx(share / record["seconds"]["high"])
        assert high[1] == pytest.approx(share / record["seconds"]["low"])
    assert axes.get_xscale() == "log"


def write_other_schema(folder):
    return bench_records.write(folder / "other.jsonl", [{**bench_records.env(), "schema": "distloop.bench/2"}])


def write_without_results(folder):
    return bench_records.write(folder / "started.jsonl", [bench_records.env()])


def write_without_environment(folder):
    return bench_records.write(folder / "torn.jsonl", bench_records.on_cpu()[1:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "holds no records"),
        (lambda folder: folder / "missing.jsonl", "missing.jsonl"),
        (write_other_schema, "other.jsonl, line 1 is of schema 'distloop.bench/2'; expected 'distloop.bench/1'"),
        (write_without_results, "started.jsonl: no result in there; expected records of a run that has ended"),
        (write_without_environment, "the environment of run run2 is missing; give its file, too"),
    ],
)
def test_what_is_no_set_of_records_is_one_sentence(tmp_path, make, words):
    with pytest.raises(UsageError) as info:
        make_sections(report.read([make(tmp_path)]))
    assert words in str(info.value)
    assert "\n" not in str(info.value)


def test_no_argument_is_a_sentence_and_exit_code_64(tmp_path):
    code, out, err = harness.run("-m", "benchmarks.report", cwd=tmp_path)
    assert (code, out) == (64, "")
    assert err.count("\n") == 1
    assert "no records are given; expected python -m benchmarks.report RUNS..." in err


def test_the_same_records_give_the_same_figure():
    results = [r for r in of_kind("result") if r["case"]["workload"] == "mnist_cnn"]
    assert len({plots.to_svg(plots.peers("t", results)) for _ in range(2)}) == 1
