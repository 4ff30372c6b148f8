"""The pages on benchmarks: their commands run."""

import re
import shlex

import pytest

from tests import harness

PAGES = {name: (harness.ROOT / name).read_text() for name in ("README.md", "docs/benchmarks/README.md")}


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "benchmarks." in line]


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
