"""The pages on benchmarks: their commands run, and every number that the README shows is on record."""

import json
import re
import shlex

import pytest

from benchmarks import records, tables
from tests import harness

PAGES = {name: (harness.ROOT / name).read_text() for name in ("README.md", "docs/benchmarks/README.md")}
MEASURED = harness.ROOT / "docs/benchmarks/two_cores"


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "benchmarks." in line]


def row(verdicts, result):
    """Return a result as the README's table has it."""
    case, step = result["case"], result["step_ms"]
    size = f"{case['workers']} process{'es' if case['workers'] > 1 else ''}"
    rate = result["throughput"]
    interval = f"{rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f})"
    efficiency = f"{result['efficiency']['value']:.0%}" if result["efficiency"] else "—"
    bound = verdicts[result["key"]]["bound"]
    parts = result["breakdown_ms"]
    shares = [f"{tables.PARTS[name].lower()} {parts[name] / step['median']:.0%}" for name in parts if parts[name]]
    shown = ", ".join(share for share in shares if not share.endswith(" 0%"))
    return f"| {size} | {interval} | {step['median']:.1f} | {efficiency} | {shown} | {bound} |"


def test_every_number_of_the_readme_is_on_record():
    found = records.read([MEASURED / "records"])
    results = [line for line in found if line["kind"] == "result" and line["case"]["mode"] == "step"]
    verdicts = {line["key"]: line for line in found if line["kind"] == "verdict"}
    expected = [row(verdicts, result) for result in results if result["key"] in verdicts]
    shown = [line for line in PAGES["README.md"].splitlines() if re.match(r"\| \d+ process", line)]
    assert shown == expected, "\n".join(expected)
    (picture,) = re.findall(r"!\[.*\]\((docs/benchmarks/two_cores/.*\.png)\)", PAGES["README.md"])
    assert (harness.ROOT / picture).is_file()


def test_the_commands_that_measured_it_are_those_of_the_script():
    script = (harness.ROOT / "docs/benchmarks/measure.sh").read_text()
    modes = set(re.findall(r"--mode=(\w+)", script))
    found = records.read([MEASURED / "records"])
    measured = {line["case"]["mode"] for line in found if line["kind"] == "result"}
    assert {"comm", "e2e", "input", "startup"} <= modes & measured
    assert {"sweep", "peers"} <= modes
    assert not any(line["dirty"] for line in found if line["kind"] == "run")


def test_what_the_machine_cannot_tell_apart_is_on_record():
    command = ("-m", "benchmarks.compare", "--aa", "--tolerance=0.5", "--json", str(MEASURED / "equal"))
    code, out, err = harness.run(*command, fresh=True)
    assert code == 0, err
    floor = json.loads(out)["floor"]
    assert f"{100 * floor:.1f} % on [the two cores" in PAGES["docs/benchmarks/README.md"]


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    # One launch of one window of each case; what is measured in full is the matter of tests/test_bench_run.py.
    short = ["--launches=1", "--windows=1", "--warmup_secs=0", "--window_secs=0.01", "--nosplit", "--batch=8"]
    for command in [line for page in PAGES for line in commands(page)]:
        words = shlex.split(command.replace("benchmark_runs", str(tmp_path)))
        if "benchmarks.run" in words:
            words += [*short, "--peers=distloop"]
            words += [] if "--output" in command else [f"--output={tmp_path / 'other'}"]
        if "benchmarks.compare" in words:
            words[-2:] = [str(tmp_path / "first"), str(tmp_path / "sweep"), "--json"]
        if "benchmarks.report" in words:
            words.append(f"--output={tmp_path / 'report'}")
        code, out, err = harness.run(*words[1:], fresh=True, limit_secs=600)
        assert code == (2 if "benchmarks.compare" in words else 0), out + err
    assert (tmp_path / "report/report.html").is_file()
