"""`train` and `evaluate` as a program calls them, in one process."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State, UsageError, evaluate, train
from distloop.metrics import TIMES
from distloop.task import named_variables
from tests import harness, toy

CONFIG = RunConfig(global_batch_size=4, epochs=2, strategy="default")


def config(tmp_path, **settings):
    return dataclasses.replace(CONFIG, workdir=str(tmp_path / "run"), **settings)


def test_train_returns_the_summary_and_evaluate_repeats_its_last_evaluation(tmp_path):
    settings = config(tmp_path)
    summary = train(toy.make_task(settings), settings)
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert evaluate(toy.make_task(settings), settings) == summary["eval"]
    assert train(toy.make_task(settings), settings) == summary  # finished: nothing is trained again
    (tmp_path / "run/summary.json").unlink()  # as if killed after the last checkpoint
    assert train(toy.make_task(settings), settings) == summary


def test_the_last_epoch_of_the_summary_is_what_numpy_says(tmp_path):
    rate = 0.05
    settings = config(tmp_path, epochs=3, learning_rate=rate, global_batch_size=10)
    task = toy.make_task(settings)

    def build():
        import keras

        kernel = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input([3]), kernel])
        return State(model=model, optimizer=keras.optimizers.SGD(rate))

    summary = train(dataclasses.replace(task, build=build), settings)
    weights, losses = np.zeros(3), []
    for _ in range(3):
        errors = toy.DATA["x"] @ weights - toy.DATA["y"]
        losses.append(np.mean(errors**2))
        weights -= rate * 2 * errors @ toy.DATA["x"] / 10
    final = np.mean((toy.DATA["x"] @ weights - toy.DATA["y"]) ** 2)
    assert summary["train"]["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert summary["eval"]["loss"] == pytest.approx(final, rel=1e-5)


def test_a_task_without_evaluation_trains(tmp_path):
    settings = config(tmp_path)
    task = dataclasses.replace(toy.make_task(settings), eval_step=None, eval_data=None)
    assert train(task, settings)["eval"] == {}
    with pytest.raises(UsageError, match="the task has no eval_data"):
        evaluate(task, settings)


def test_a_run_that_ends_inside_an_epoch_reports_what_it_saw_of_it(tmp_path):
    settings = config(tmp_path, epochs=None, train_steps=5, steps_per_call=1)
    summary = train(toy.make_task(settings), settings)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = [line["loss"] for line in lines if line["split"] == "train"][3:]
    assert summary["train"]["loss"] == pytest.approx(np.mean(seen))  # steps 4 and 5, with 4 examples each
    assert summary["examples"] == 18


def test_without_a_checkpoint_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(UsageError, match="has no checkpoint; train there first"):
        evaluate(toy.make_task(CONFIG), config(tmp_path))


def test_two_replicas_train_and_evaluate_again_and_again_in_one_process(tmp_path, mirrored):
    settings = config(tmp_path, strategy="mirrored", replicas=2)
    summary = train(toy.make_task(settings), settings)
    assert evaluate(toy.make_task(settings), settings) == summary["eval"]
    other = dataclasses.replace(settings, workdir=str(tmp_path / "other"))
    repeated = train(toy.make_task(other), other)
    assert (repeated["train"], repeated["eval"]) == (summary["train"], summary["eval"])


def test_training_gives_each_replica_seeds_of_its_own(tmp_path, mirrored):
    settings = config(tmp_path, strategy="mirrored", replicas=2)
    task, states = toy.make_task(settings), []

    def build():
        states.append(task.build())
        return states[0]

    train(dataclasses.replace(task, build=build), settings)
    (seed,) = [v for name, v in named_variables(states[0]).items() if name.endswith("seed_generator_state")]
    (first, drawn), (second, drawn_too) = (local.numpy() for local in mirrored.experimental_local_results(seed))
    assert first != second
    assert drawn == drawn_too == 6  # one mask a step, on each replica


def test_synchronized_batch_normalization_is_saved_as_every_replica_has_it(tmp_path, mirrored):
    import keras

    states = []

    def build():
        normalize = keras.layers.BatchNormalization(synchronized=True)
        model = keras.Sequential([keras.Input([3]), normalize, keras.layers.Dense(1)])
        states.append(State(model=model, optimizer=keras.optimizers.SGD(0.01)))
        return states[-1]

    settings = config(tmp_path, strategy="mirrored", replicas=2)
    task = dataclasses.replace(toy.make_task(settings), build=build)
    summary = train(task, settings)
    for variable in states[0].model.variables:
        first, second = mirrored.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    assert evaluate(task, settings) == summary["eval"]


def test_a_function_that_makes_a_task_is_not_a_task(tmp_path):
    with pytest.raises(UsageError, match=r"task is a function; expected a distloop\.Task, such as make_task\(config\)"):
        train(toy.make_task, config(tmp_path))


def test_a_build_that_returns_no_state_is_refused(tmp_path):
    task = dataclasses.replace(toy.make_task(CONFIG), build=lambda: None)
    with pytest.raises(UsageError, match=r"build returned NoneType; expected a distloop\.State"):
        train(task, config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_the_same_bits_with_loss_scale_averages_and_dropout(tmp_path):
    settings = config(
        tmp_path,
        precision="mixed_float16",
        initial_loss_scale=2.0**24,  # overflows at first, so that skipped steps are inside
        loss_scale_growth_steps=3,
        ema_momentum=0.9,
        micro_batches=2,
        clip_global_norm=1.0,
        checkpoint_every_steps=2,
    )

    def last_checkpoint():
        folder = max((tmp_path / "run/checkpoints").iterdir())
        reader = tf.train.load_checkpoint(str(folder / "state"))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

    summary = train(toy.make_task(settings), settings)
    whole, lines = last_checkpoint(), (tmp_path / "run/metrics.jsonl").read_text()
    assert whole["loss_scale/optimizer/skipped"] > 0
    assert any(name.startswith("average/optimizer/net/") for name in whole)
    shutil.rmtree(max((tmp_path / "run/checkpoints").iterdir()))
    (tmp_path / "run/summary.json").unlink()  # as if killed after the last checkpoint but one
    again = train(toy.make_task(settings), settings)
    assert again["eval"] == summary["eval"]
    assert again["train"] == summary["train"]
    resumed = last_checkpoint()
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)

    def without_times(text):
        return [
            {key: value for key, value in json.loads(line).items() if key not in TIMES} for line in text.splitlines()
        ]

    assert without_times((tmp_path / "run/metrics.jsonl").read_text()) == without_times(lines)


def test_the_average_of_the_weights_is_what_is_evaluated(tmp_path):
    settings = config(tmp_path, ema_momentum=0.5, train_steps=1, epochs=None)
    task, states = toy.make_task(settings), []

    def build():
        states.append(task.build())
        return states[0]

    summary = train(dataclasses.replace(task, build=build), settings)
    (state,) = states
    for variable, average in state.averages.values():
        variable.assign(average)  # as evaluation has seen it
    errors = state.model.predict(toy.DATA["x"], verbose=0)[:, 0] - toy.DATA["y"]
    assert summary["eval"]["loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)


def patience():
    """Return the action of docs/checkpoints.md."""
    (block,) = re.findall(r"```python\n(.*?)```", (harness.ROOT / "docs/checkpoints.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(block, "checkpoints.md", "exec"), names)
    return names["Patience"]()


def test_what_actions_keep_is_resumed(tmp_path):
    settings = config(tmp_path, steps_per_call=1, checkpoint_every_steps=2)
    whole, killed, resumed = patience(), patience(), patience()
    train(toy.make_task(settings), settings, extra_actions=[whole])
    other = dataclasses.replace(settings, workdir=str(tmp_path / "other"))

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(toy.make_task(other), other, extra_actions=[killed, stop])
    assert killed.host_state != whole.host_state
    train(toy.make_task(other), other, extra_actions=[resumed])
    assert resumed.host_state == whole.host_state
    assert resumed.host_state["best"] is not None


def test_what_an_action_keeps_must_be_json(tmp_path):
    act = patience()
    act.host_state["best"] = np.float32(1)
    with pytest.raises(UsageError, match=r"the host_state of the action 'Patience' cannot be saved \(.*float32"):
        train(toy.make_task(CONFIG), config(tmp_path), extra_actions=[act])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_checkpoint_is_kept_until_it_is_beaten(tmp_path, mode):
    settings = config(
        tmp_path,
        epochs=8,
        learning_rate=0.3,  # so that the loss goes up and down
        eval_every_steps=1,
        checkpoint_every_steps=3,
        keep_checkpoints=2,
        best_metric="loss",
        best_mode=mode,
    )
    best = train(toy.make_task(settings), settings)["best"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if line["split"] == "eval"}
    expected = (min if mode == "min" else max)(found, key=found.get)
    assert best == {"metric": "loss", "value": found[expected], "step": expected}
    kept = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "run/checkpoints").iterdir())
    assert expected in kept
    assert kept[-1] == 24
    assert len(kept) <= 3


def test_a_best_metric_that_there_is_not_is_refused_before_anything_is_written(tmp_path):
    settings = config(tmp_path, best_metric="acuracy")
    with pytest.raises(UsageError, match="best_metric is 'acuracy'; expected a metric of the evaluation: loss"):
        train(toy.make_task(settings), settings)
    task = dataclasses.replace(toy.make_task(settings), eval_step=None, eval_data=None)
    with pytest.raises(UsageError, match="but the task has no eval_data to find the best with"):
        train(task, settings)
    assert list(tmp_path.iterdir()) == []
