"""`--jit_compile=auto`: the decision, and that nothing but the decision is left of it."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State, train, xla
from distloop.cluster import Cluster
from distloop.startup import set_up, train_stream
from distloop.storage import as_path
from distloop.task import named_variables
from distloop.updates import rule_of
from tests import harness, toy


def ready(tmp_path, strategy, task=None):
    config = RunConfig(global_batch_size=4, workdir=str(tmp_path / "run"), jit_compile="auto")
    return set_up(task or toy.make_task(config), config, as_path(config.workdir), Cluster(), "any", strategy)


def decide(setup, before=None):
    return xla.decide(setup, train_stream(setup), 0, tf.Variable(0.0), before=before)


def test_the_faster_kind_is_chosen_and_the_state_is_as_before(tmp_path, strategy):
    setup = ready(tmp_path, strategy)
    variables = named_variables(setup.state)
    before = {name: variable.numpy() for name, variable in variables.items()}
    found = decide(setup)
    assert found["jit_compile"] is (found["on_ms"] < found["off_ms"])
    assert rule_of(setup.state.optimizer).jit_compile is found["jit_compile"]
    for name, variable in variables.items():
        for local in setup.strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(local.numpy(), before[name])


@pytest.mark.parametrize("on", [True, False])
def test_a_resumed_run_keeps_to_the_decision_without_measuring(tmp_path, on):
    setup = ready(tmp_path, tf.distribute.get_strategy())
    decision = {"jit_compile": on, "off_ms": 1.0, "on_ms": 1.0}
    assert decide(setup, before=decision) is decision
    assert rule_of(setup.state.optimizer).jit_compile is on


def test_a_layer_that_exchanges_in_its_forward_pass_is_not_compiled(tmp_path, mirrored):
    def build():
        norm = keras.layers.BatchNormalization(synchronized=True)
        model = keras.Sequential([keras.Input([3]), norm, keras.layers.Dense(1)])
        return State(model=model, optimizer=keras.optimizers.SGD(0.1))

    task = dataclasses.replace(toy.make_task(RunConfig()), build=build)
    found = decide(ready(tmp_path, mirrored, task))
    assert found["jit_compile"] is False
    assert "synchronized=True: it exchanges statistics" in xla.text(found)


def test_a_run_that_decides_has_the_numbers_of_its_decision(tmp_path):
    settings = RunConfig(global_batch_size=4, epochs=2, strategy="default", workdir=str(tmp_path / "auto"))
    chosen = train(toy.make_task(settings), dataclasses.replace(settings, jit_compile="auto"))
    jit_compile = chosen["xla"]["jit_compile"]
    plain = dataclasses.replace(settings, workdir=str(tmp_path / "plain"), jit_compile=jit_compile)
    assert (chosen["train"], chosen["eval"]) == tuple(train(toy.make_task(plain), plain)[k] for k in ("train", "eval"))


def test_two_workers_decide_alike_and_say_so(tmp_path):
    command = ("-m", "distloop", "--task=tests.toy:make_task", "--global_batch_size=4", "--train_steps=8")
    command = (*command, "--jit_compile=auto", f"--workdir={tmp_path / 'run'}")
    (chief, *others) = harness.run_workers(command, workers=2)
    for code, out, err in (chief, *others):
        assert code == 0, out + err
    assert "jit_compile: auto chose o" in chief[1]
    assert json.loads((tmp_path / "run/summary.json").read_text())["xla"]["on_ms"] > 0
