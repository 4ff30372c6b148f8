"""Weights of another run as the start of a new one."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from etils import epath

from distloop import RunConfig, State, UsageError, checkpoint_files, train
from distloop.finetune import load_weights
from tests import toy

SETTINGS = dict(global_batch_size=4, epochs=1, strategy="default")


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A run of two epochs that kept averages."""
    folder = tmp_path_factory.mktemp("other")
    config = RunConfig(**SETTINGS | {"epochs": 2}, workdir=str(folder), ema_momentum=0.5)
    train(toy.make_task(config), config)
    return folder


def values_of(folder):
    return checkpoint_files.read(checkpoint_files.complete_folders(epath.Path(folder) / "checkpoints")[-1]).values


def wider(units):
    """Return the toy's state with another last layer but one."""
    keras.utils.clear_session()
    dense = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(units)]
    model = keras.Sequential([keras.Input([3]), *dense], name="net")
    return State(model=model, optimizer=keras.optimizers.SGD(0.1))


def test_what_fits_is_taken_from_the_averages_and_the_rest_is_listed(other_run):
    state, theirs = wider(2), values_of(other_run)
    before = toy.to_numpy(state)
    loaded = load_weights(str(other_run), state, report=print)
    assert (loaded.step, loaded.averages) == (6, True)
    assert loaded.loaded == ["model/net/dense/kernel", "model/net/dense/bias"]
    assert loaded.only_here == [
        f"model/net/batch_normalization/{n}" for n in ("gamma", "beta", "moving_mean", "moving_variance")
    ]
    assert loaded.other_kind[0] == "model/net/dense_1/kernel ([4, 1] float32 there, [4, 2] float32 here)"
    assert "optimizer/adam/iteration" in loaded.not_taken
    assert not {*loaded.loaded} & {*loaded.not_taken}
    for name, value in toy.to_numpy(state).items():
        average = "average/optimizer/" + name.removeprefix("model/")
        expected = theirs[average] if name in loaded.loaded else before[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert (theirs["model/net/dense/kernel"] != theirs["average/optimizer/net/dense/kernel"]).any()
    assert "2 variables loaded, averages of the weights" in loaded.text()
    assert "not loaded: model/net/dense_1/kernel ([4, 1]" in loaded.text()


def test_a_checkpoint_of_other_names_is_refused_with_both(other_run):
    state = State(net=keras.Sequential([keras.Input([3]), keras.layers.Dense(4)], name="other"))
    with pytest.raises(UsageError, match="nothing in it has the name and the shape") as refusal:
        load_weights(str(other_run), state, report=print)
    assert "here: net/other/" in str(refusal.value)
    assert "there: " in str(refusal.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no sound checkpoint; expected a workdir or a checkpoint"):
        load_weights(str(tmp_path), wider(1), report=print)


def test_a_run_starts_from_the_other_ones_weights_once_and_its_averages_too(other_run, tmp_path):
    (*_, checkpoint) = sorted((other_run / "checkpoints").iterdir())
    config = RunConfig(
        **SETTINGS, workdir=str(tmp_path), ema_momentum=0.9, learning_rate=1e-9, init_from=str(checkpoint), seed=5
    )
    train(toy.make_task(config), config)
    ours, theirs = values_of(tmp_path), values_of(other_run)
    told = json.loads((tmp_path / "init_from.json").read_text())
    assert (told["checkpoint"], told["step"], told["averages"]) == (str(checkpoint), 6, True)
    for name in told["loaded"]:
        average = "average/optimizer/" + name.removeprefix("model/")
        np.testing.assert_allclose(ours[name], theirs[average], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(ours[average], theirs[average], atol=1e-6, err_msg=name)
    assert ours["step"] == 3

    (tmp_path / "summary.json").unlink()
    longer = dataclasses.replace(config, workdir=str(tmp_path))
    train(toy.make_task(longer), longer)  # resumes: the other run is not looked at again
    for name, value in values_of(tmp_path).items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)
