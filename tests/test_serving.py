"""Exported models, loaded by a process that knows nothing of distloop."""

import json
import textwrap
from typing import Any

import keras
import numpy as np
import pytest
from etils import epath

from distloop import RunConfig, State, UsageError, checkpoint_files, export, train
from tests import harness, toy

SETTINGS = dict(global_batch_size=4, epochs=2, task="tests.own_task:good", ema_momentum=0.5)
X = np.random.default_rng(3).normal(size=[5, 3]).astype(np.float32)
FRESH = textwrap.dedent("""
    import json, sys
    sys.modules["distloop"] = None  # importing it would fail
    import keras, tensorflow as tf
    x = tf.constant(json.loads(sys.argv[1]), tf.float32)
    for path in sys.argv[2:]:
        keras_file = path.endswith(".keras")
        model = keras.models.load_model(path) if keras_file else tf.saved_model.load(path)
        output = model(x) if keras_file else model.serve(x)
        print(json.dumps(output.numpy().tolist()))
""")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with a run on two replicas, which keeps the best, and one on one device, which does not."""
    folder = tmp_path_factory.mktemp("runs")
    config = RunConfig(**SETTINGS, workdir=str(folder / "mirrored"), replicas=2, best_metric="loss", best_mode="min")
    train(config.task, config)
    train(config.task, RunConfig(**SETTINGS, workdir=str(folder / "one"), strategy="default"))
    return folder


def expected(workdir, *, averaged=False, step=None):
    """Compute with NumPy what the model in a checkpoint says of X."""
    *_, newest = checkpoint_files.complete_folders(epath.Path(workdir / "checkpoints"))
    values = checkpoint_files.read(checkpoint_files.folder_of(newest.parent, step) if step else newest).values
    prefix = "average/optimizer/net" if averaged else "model/net"
    w = [values[f"{prefix}/{name}"] for name in ("dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias")]
    return np.tanh(X @ w[0] + w[1]) @ w[2] + w[3]


@pytest.mark.slow
def test_models_of_any_strategy_say_the_same_in_a_process_without_distloop(runs, tmp_path):
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    code, out, err = harness.run(
        *harness.supervised("-m", "distloop", *flags, f"--workdir={runs / 'two'}", workers=2), fresh=True
    )
    assert code == 0, out + err
    made = {}
    for run, averaged, name in (
        ("mirrored", False, "plain"),
        ("mirrored", True, "averaged.keras"),
        ("two", False, "two.keras"),
        ("two", True, "averaged_two"),
    ):
        output = str(tmp_path / name)
        form = "keras" if name.endswith(".keras") else "saved_model"
        assert export(str(runs / run), output, format=form, averaged=averaged) == [output]
        made[output] = expected(runs / run, averaged=averaged)
    best = json.loads((runs / "mirrored/summary.json").read_text())["best"]
    output = str(tmp_path / "new/best.keras")
    flags = (f"--workdir={runs / 'mirrored'}", f"--output={output}", "--format=keras", "--best")
    code, out, err = harness.run("-m", "launch.export", *flags)
    assert (code, out) == (0, f"{output}\n"), out + err
    made[output] = expected(runs / "mirrored", step=best["step"])

    code, out, err = harness.run("-c", FRESH, json.dumps(X.tolist()), *made, limit_secs=120)
    assert code == 0, err
    for (path, value), line in zip(made.items(), out.splitlines(), strict=True):
        np.testing.assert_allclose(json.loads(line), value, rtol=1e-5, atol=1e-6, err_msg=path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"plain", "averaged.keras", "two.keras", "averaged_two", "new"}  # and nothing half-written


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(format="onnx"), "format is 'onnx'; expected one of saved_model, keras."),
        (dict(part="critic"), "part is 'critic'; expected a model of the run: model."),
        (dict(format="keras"), "expected a name that ends in .keras for format=keras."),
        (dict(best=True), "has no best checkpoint; train with --best_metric, or take the newest."),
        (dict(workdir="/nowhere"), "workdir /nowhere has no config.json; expected the folder of a run."),
        (dict(output="exists"), "exists; give a new path."),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(runs, tmp_path, arguments, sentence):
    (tmp_path / "exists").mkdir()
    output = tmp_path / arguments.pop("output", "new")
    with pytest.raises(UsageError) as refusal:
        export(**{"workdir": str(runs / "one"), "output": str(output)} | arguments)
    assert sentence in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["exists"]


def test_several_models_are_written_under_their_names_or_none_is(tmp_path, monkeypatch):
    config = RunConfig(global_batch_size=4, epochs=1, strategy="default", workdir=str(tmp_path / "run"))
    task = toy.make_task(config)

    def build():
        state = task.build()
        return State(**state.parts, helper=keras.Sequential([keras.Input([2]), keras.layers.Dense(2)], name="helper"))

    both = type(task)(build, task.train_step, task.train_data)
    train(both, config)
    output = tmp_path / "out"
    paths = export(config.workdir, str(output), task=both, format="keras")
    assert paths == [str(output / "model.keras"), str(output / "helper.keras")]
    helper: Any = keras.models.load_model(paths[1])
    assert helper.name == "helper"

    def fails(self, path, **settings):
        epath.Path(path).write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(keras.Model, "save", fails)
    with pytest.raises(OSError, match="the disk is full"):
        export(config.workdir, str(tmp_path / "other"), task=both, format="keras")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}
