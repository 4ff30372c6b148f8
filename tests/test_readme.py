"""The README's code runs as it stands, and its tables say what is true."""

import re
import shlex
from dataclasses import fields
from typing import Any

import keras
import numpy as np
import pytest

from distloop import State, Task, train
from distloop.config import RunConfig
from distloop.launcher.processes import free_ports
from tests import harness, streams, toy

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
            shown = "off" if setting.default is False else str(setting.default)
            assert shown.removesuffix(".0") in table[setting.name], setting.name


def steps_of_readme():
    """Return the README's step functions by name."""
    names = {}
    for language, block in BLOCKS:
        if language == "python" and "_step(state, batch):" in block and "def make_task" not in block:
            exec(compile(block, "README.md", "exec"), names)
    return names


def dense(units, inputs):
    return keras.Sequential(
        [keras.Input([inputs]), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(units)]
    )


def test_the_step_function_trains(strategy):
    def build():
        return State(model=dense(2, 4), optimizer=keras.optimizers.SGD(0.5))

    data = {"image": np.eye(4, dtype=np.float32), "label": np.array([0, 1, 1, 0])}
    _, _, call = toy.compiled(strategy, Task(build, steps_of_readme()["train_step"], lambda: data))
    first = call(1).sums[0]
    call(99)
    assert list(call.metrics) == ["loss", "accuracy"]
    assert call(1).sums[0] < 0.5 * first


def test_the_language_step_divides_by_its_tokens(strategy):
    def build():
        layers = [keras.Input([4], dtype="int32"), keras.layers.Embedding(5, 8), keras.layers.Dense(5)]
        return State(model=keras.Sequential(layers), optimizer=keras.optimizers.Adam(0.05))

    tokens = np.arange(20).reshape([4, 5]) % 5
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], np.float32)
    task = Task(build, steps_of_readme()["language_step"], lambda: {"tokens": tokens, "mask": mask})
    _, _, call = toy.compiled(strategy, task)
    first = call(1).sums
    assert first[1] == mask[:, 1:].sum()
    call(99)
    assert call(1).sums[0] < 0.5 * first[0]


def test_the_gan_step_trains_both_models(strategy):
    def build():
        generator, critic = dense(3, 16), dense(1, 3)
        optimizers = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
        optimizers[0].build(critic.trainable_variables)
        optimizers[1].build(generator.trainable_variables)
        return State(
            generator=generator,
            critic=critic,
            critic_optimizer=optimizers[0],
            generator_optimizer=optimizers[1],
            noise=keras.random.SeedGenerator(1),
        )

    data = {"x": np.ones([8, 3], np.float32)}
    state, _, call = toy.compiled(strategy, Task(build, steps_of_readme()["gan_step"], lambda: data))
    before = toy.to_numpy(state)
    call(20)
    assert list(call.metrics) == ["critic_loss", "generator_loss"]
    assert int(state.generator_optimizer.iterations.numpy()) == int(state.critic_optimizer.iterations.numpy()) == 20
    for name, value in toy.to_numpy(state).items():
        if name.startswith(("generator/", "critic/")):
            assert np.isfinite(value).all(), name
            assert (value != before[name]).any(), name


def test_the_results_are_those_of_the_records():
    records = (harness.ROOT / "docs/evidence/README.md").read_text()
    rows = [row.split("|")[1:3] for row in README.splitlines() if row.startswith("| `mnist_")]
    assert len(rows) == 3
    for run, accuracy in rows:
        assert re.search(rf"accuracy │ 0\.\d+ │ {accuracy.strip()} │", records), run


def test_the_largest_difference_is_that_of_the_record():
    page = (harness.ROOT / "docs/equivalence.md").read_text()
    rows = [row.strip("| ").split(" | ") for row in page.splitlines() if re.match(r"\| .*\| \d", row)]
    largest = max(float(cell) for row in rows if row[1] == "1e-05" for cell in row[2:])
    assert f"{len(rows)} kinds of step on five strategies, 1e{round(np.log10(largest))} in float32" in README


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow) if "=2" in command else command
        for command in COMMANDS
        if "launch." in command and "venv" not in command
    ],
)
def test_the_commands_run(tmp_path, command):
    (task,) = [block for language, block in BLOCKS if language == "python" and "def make_task" in block]
    (tmp_path / "circle.py").write_text(task)
    python, *arguments = shlex.split(command)
    assert python == "python"
    process = harness.start(arguments, cwd=tmp_path, fresh=True, PYTHONPATH=f"{harness.ROOT}:{tmp_path}")
    code, out, err = harness.finish(process)
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


def test_the_page_on_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = (harness.ROOT / "docs/data.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(code, "docs/data.md", "exec"), names)
    read = [streams.read(source, steps=13) for source in (names["train_data"](), names["small"], names["large"])]
    for batches in read:
        assert batches["weight"].sum() == 100
        np.testing.assert_array_equal(batches["image"], read[0]["image"])
        np.testing.assert_array_equal(batches["words"], read[0]["words"])


def commands_of(page):
    blocks = re.findall(r"```sh\n(.*?)```", (harness.ROOT / page).read_text(), flags=re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def test_the_page_on_checkpoints_runs(tmp_path):
    page = (harness.ROOT / "docs/checkpoints.md").read_text()
    (patience,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(patience, "docs/checkpoints.md", "exec"), names)
    settings = RunConfig(workdir=str(tmp_path / "runs/toy"), strategy="default", global_batch_size=4, train_steps=4)
    action = names["Patience"]()
    train(toy.make_task(settings), settings, extra_actions=[action])
    assert action.host_state["best"] is not None

    commands = [
        ["-m", "launch.train", "--task=mnist_tutorial", "--train_steps=2", "--workdir=runs/mnist_cnn"],
        *commands_of("docs/checkpoints.md"),
    ]
    for command in commands:
        code, out, err = harness.finish(harness.start(command, cwd=tmp_path))
        assert code == 0, out + err
    loaded: Any = keras.models.load_model(tmp_path / "exported/mnist_cnn.keras")
    assert loaded.weights
    assert (tmp_path / "exported/mnist_cnn/saved_model.pb").exists()


@pytest.mark.slow
def test_the_page_on_the_data_service_runs(tmp_path):
    (port,) = free_ports(1)
    service, command = (
        [part.replace("5050", str(port)) for part in one] for one in commands_of("docs/data_service.md")
    )
    server = harness.start(service, cwd=tmp_path)
    try:
        harness.until(lambda: "train with --data_service=" in server.output()[0], server)
        code, out, err = harness.finish(harness.start([*command, "--train_steps=10"], cwd=tmp_path))
        assert code == 0, out + err
    finally:
        harness.kill(server)
