"""The README's code runs as it stands, and its tables say what is true."""

import re
import shlex
from dataclasses import fields

import pytest

from distloop.config import RunConfig
from tests import harness

README = (harness.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


def test_exactly_two_commands_set_up_everything():
    set_up = [command for command in COMMANDS if "venv" in command]
    assert len(set_up) == 2
    assert "launch.train --task=mnist_cnn" in set_up[0]
    assert "pytest" in set_up[1]


def test_the_flags_table_lists_every_flag_and_its_default():
    rows = [row.split("|") for row in README.splitlines() if row.startswith("| `--")]
    table = {flag: default for _, names, default, *_ in rows for flag in re.findall(r"`--(\w+)`", names)}
    assert set(table) == {setting.name for setting in fields(RunConfig)}
    for setting in fields(RunConfig):
        if setting.default is not None:
            assert str(setting.default) in table[setting.name], setting.name


def test_the_step_function_trains(tmp_path):
    import keras
    import numpy as np
    import tensorflow as tf

    from distloop import State, Task
    from tests import toy

    (source,) = [block for language, block in BLOCKS if language == "python" and block.startswith("import keras")]
    names = {}
    exec(compile(source, "README.md", "exec"), names)

    def build():
        return State(
            model=keras.Sequential([keras.Input([4]), keras.layers.Dense(2)]), optimizer=keras.optimizers.SGD(0.1)
        )

    data = {"image": np.eye(4, dtype=np.float32), "label": np.array([0, 1, 1, 0])}
    _, _, call = toy.compiled(tf.distribute.get_strategy(), Task(build, names["train_step"], lambda: data))
    rows = call(100)
    assert list(call.metrics) == ["loss", "accuracy"]
    assert rows[-1, 0, 0] < 0.5 * rows[0, 0, 0]


def test_the_results_are_those_of_the_records():
    records = (harness.ROOT / "docs/evidence/README.md").read_text()
    rows = [row.split("|")[1:3] for row in README.splitlines() if row.startswith("| `mnist_")]
    assert len(rows) == 3
    for run, accuracy in rows:
        assert re.search(rf"accuracy │ 0\.\d+ │ {accuracy.strip()} │", records), run


@pytest.mark.parametrize("command", [command for command in COMMANDS if "launch." in command and "venv" not in command])
def test_the_commands_run(tmp_path, command):
    (task,) = [block for language, block in BLOCKS if language == "python" and "def make_task" in block]
    (tmp_path / "circle.py").write_text(task)
    python, *arguments = shlex.split(command)
    assert python == "python"
    code, out, err = harness.finish(harness.start(arguments, cwd=tmp_path, PYTHONPATH=f"{harness.ROOT}:{tmp_path}"))
    assert code == 0, out + err
    (summary,) = tmp_path.glob("runs/*/summary.json")
    accuracy = float(re.search(r'"eval": \{[^}]*"accuracy": ([\d.]+)', summary.read_text()).group(1))
    assert accuracy > 0.93


def test_the_python_example_runs(tmp_path):
    python = [block for language, block in BLOCKS if language == "python"]
    (task,) = [block for block in python if "def make_task" in block]
    (example,) = [block for block in python if block.startswith("from circle")]
    (tmp_path / "circle.py").write_text(task)
    (tmp_path / "example.py").write_text(example)
    process = harness.start(["example.py"], cwd=tmp_path, PYTHONPATH=f"{harness.ROOT}:{tmp_path}")
    code, out, err = harness.finish(process)
    assert code == 0, out + err
