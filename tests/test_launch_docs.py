"""Each command on the pages of docs/launch runs or is checked, and what they say of flags and numbers is so."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from distloop.launcher import fault, watchdog
from distloop.launcher.emit_settings import KINDS
from tests import harness, page_programs

PAGES = sorted((harness.ROOT / "docs/launch").glob("*.md"))


def blocks(page):
    return re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_right(page, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", *page_programs.TAKEN):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.page_programs {name} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": str(harness.ROOT),
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        ["/bin/bash", "-eu", "-c", "\n".join(blocks(page))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines():  # of --dry_run
        assert "launch.train" in shlex.split(line), line


def test_the_pages_show_every_kind_of_file():
    shown = {kind for page in PAGES for block in blocks(page) for kind in re.findall(r"--emit=(\w+)", block)}
    assert shown == set(KINDS)


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
            other = (page.parent / file if file else page).read_text()
            headings = re.findall(r"^#+ (.*)$", other, flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_fault_has_its_row():
    page = (harness.ROOT / "docs/launch/checks.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE)) == fault.KINDS


def test_the_floors_are_those_of_the_watchdog():
    page = (harness.ROOT / "docs/launch/machine.md").read_text()
    floors = watchdog.FLOORS
    assert f"a step {floors['step']} s, `input` and `eval` {floors['input']} s, and {floors['save']} s where" in page
    assert floors["input"] == floors["eval"]
    assert {floors[phase] for phase in ("setup", "compile", "save", "action")} == {floors["save"]}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["machine", "checks"])
def test_the_commands_run(page, tmp_path):
    (path,) = [one for one in PAGES if one.stem == page]
    commands = "\n".join(block for block in blocks(path)).replace("\\\n", "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    for line in commands.splitlines():
        if "per_gpu" in line or line.startswith("python -m launch.doctor"):
            continue  # needs GPUs; finds what is wrong with this machine, which test_doctor.py is about
        script = f"import os; os.execvp('bash', ['bash', '-euc', {line!r}])"
        process = harness.start(
            ["-c", script],
            cwd=tmp_path,
            fresh=True,
            PATH=f"{tmp_path}/bin:/usr/bin:/bin",
        )
        code, out, err = harness.finish(process, limit_secs=300)
        assert code == 0, f"{line}\n{out}\n{err}"
    if page == "checks":
        assert json.loads((tmp_path / "runs/rehearsal/summary.json").read_text())["steps"] == 90
