"""Promise P8 for the step: what cannot work is answered with one sentence, before the first step, on any strategy."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State, Task, mean, minimize
from distloop.data import make_stream
from distloop.errors import UsageError
from tests import toy

TASK = toy.make_task(RunConfig())
STRANGER = keras.optimizers.SGD()


def refusal(strategy, train_step):
    with pytest.raises(UsageError) as refused:
        toy.compiled(strategy, dataclasses.replace(TASK, train_step=train_step))
    return str(refused.value)


def test_a_step_that_calls_strategy_run_is_refused(strategy):
    def step(state, batch):
        return tf.distribute.get_strategy().run(TASK.train_step, args=(state, batch))

    assert "the step called a function of tf.distribute that belongs outside of it" in refusal(strategy, step)


def test_a_step_that_calls_strategy_reduce_is_refused(strategy):
    def step(state, batch):
        metrics = TASK.train_step(state, batch)
        tf.distribute.get_strategy().reduce("SUM", batch["weight"], axis=0)
        return metrics

    assert "the step called a function of tf.distribute that belongs outside of it" in refusal(strategy, step)


@pytest.mark.parametrize(
    "make",
    [
        lambda state: tf.Variable(1.0, name="mine"),
        lambda state: keras.Variable(1.0, name="mine"),
        lambda state: keras.layers.Dense(3, name="mine")(tf.ones([2, 2])),
        lambda state: keras.random.normal([2]),  # Keras's global seed generator
    ],
)
def test_a_step_that_creates_a_variable_is_refused(strategy, make):
    def step(state, batch):
        make(state)
        return TASK.train_step(state, batch)

    assert "make layers, optimizers, seed generators and variables in the task's build" in refusal(strategy, step)


def test_a_loss_that_creates_a_layer_is_refused(strategy):
    def step(state, batch):
        def loss(b):
            hidden = keras.layers.Dense(3, name="mine")(b["x"])
            return state.model(b["x"])[:, 0] + hidden[:, 0]

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    assert "make layers, optimizers, seed generators and variables in the task's build" in refusal(strategy, step)


def test_an_optimizer_made_outside_the_scope_is_refused(mirrored):
    optimizer = keras.optimizers.Adam()

    def build():
        state = TASK.build()
        return State(model=state.model, optimizer=optimizer)

    with (
        mirrored.scope(),
        pytest.raises(
            UsageError, match=r"the variable 'optimizer/adam\w*/iteration' was not made in the strategy's scope"
        ),
    ):
        build()


def test_a_model_made_outside_the_scope_is_refused(mirrored):
    model = TASK.build().model
    with (
        mirrored.scope(),
        pytest.raises(UsageError, match=r"the variable 'model/net/dense.*' was not made in the strategy's scope"),
    ):
        State(model=model)


def test_an_optimizer_of_other_variables_is_refused(strategy):
    def build():
        state = TASK.build()
        other = keras.optimizers.SGD(0.1)
        other.build([keras.Variable(1.0)])
        return State(model=state.model, optimizer=other)

    with pytest.raises(UsageError, match=r"the optimizer was built for other variables than 'net/dense\w*/kernel'"):
        toy.compiled(strategy, dataclasses.replace(TASK, build=build))


def test_a_loss_of_none_of_the_variables_is_refused(strategy):
    def step(state, batch):
        return minimize(lambda b: tf.square(b["y"]), batch, state.optimizer, state.model.trainable_variables)

    assert "the loss depends on none of the variables given to minimize" in refusal(strategy, step)


def test_a_keras_metric_updated_in_the_loss_is_refused(strategy):
    def build():
        return State(**TASK.build().parts)

    metric = []

    def step(state, batch):
        def loss(b):
            metric[0].update_state(b["y"])
            return tf.square(state.model(b["x"])[:, 0] - b["y"])

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    with strategy.scope():
        metric.append(keras.metrics.Mean(name="y"))
    task = Task(build, step, TASK.train_data)
    with pytest.raises(UsageError, match=r"updates the Keras metric .*return it instead, as keras_metric\("):
        toy.compiled(strategy, task)


def test_two_losses_of_one_step_must_have_names(strategy):
    def step(state, batch):
        first = TASK.train_step(state, batch)
        return {**first, **TASK.train_step(state, batch)}

    assert 'the step calls minimize twice without names: give each a name="..."' in refusal(strategy, step)


@pytest.mark.parametrize("settings", [dict(clipnorm=1.0), dict(use_ema=True), dict(gradient_accumulation_steps=2)])
def test_an_optimizer_with_settings_of_its_own_is_refused_by_minimize_too(settings):
    def build():
        return State(model=TASK.build().model, optimizer=keras.optimizers.Adam(0.1, **settings))

    with pytest.raises(UsageError, match="which Keras applies to the gradients of one replica"):
        toy.compiled(tf.distribute.get_strategy(), dataclasses.replace(TASK, build=build))


@pytest.mark.parametrize(
    "batches",
    [
        [{"x": np.zeros(3)}, {"x": np.zeros(4)}],
        [{"x": np.zeros(3)}, {"y": np.zeros(3)}],
    ],
)
def test_batches_of_different_structures_are_refused_before_the_first_step(batches):
    def examples():
        yield from batches

    source = tf.data.Dataset.from_generator(examples, output_signature={"x": tf.TensorSpec([None], tf.float64)})
    with pytest.raises(UsageError, match="expected single examples of one fixed shape"):
        make_stream(source.apply(tf.data.experimental.assert_cardinality(2)), name="data", global_batch_size=2, seed=0)


def test_a_batch_whose_structure_changes_between_calls_stops_with_a_sentence(strategy):
    def examples():
        for number in range(20):
            yield {"x": np.zeros(3, np.float32), "y": np.float32(0)} if number < 6 else {"x": np.zeros(3, np.float32)}

    signature = {"x": tf.TensorSpec([3], tf.float32), "y": tf.TensorSpec([], tf.float32)}
    source = tf.data.Dataset.from_generator(examples, output_signature=signature)
    source = source.apply(tf.data.experimental.assert_cardinality(20))
    _, _, call = toy.compiled(strategy, dataclasses.replace(TASK, train_data=lambda: source))
    with pytest.raises(UsageError, match=r"the data stopped with .* every example must have the structure"):
        call(5)


def test_what_a_metric_returned_besides_is_still_checked(strategy):
    def step(state, batch):
        return {**TASK.train_step(state, batch), "y": mean(batch["y"], tf.ones([3]))}

    assert "expected one value and one weight an example" in refusal(strategy, step)


@pytest.mark.parametrize("part", ["train_step", "eval_step"])
def test_statistics_written_outside_of_a_loss_function_are_refused(strategy, part):
    def build():
        layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
        return State(model=keras.Sequential([keras.Input([3]), *layers], name="net"), optimizer=keras.optimizers.SGD())

    def step(state, batch):
        state.model(batch["x"], training=True)
        return getattr(TASK, part)(state, batch)

    with pytest.raises(
        UsageError, match=r"a layer writes '.*moving_mean' outside of a loss function, .* training=False"
    ):
        toy.compiled(strategy, dataclasses.replace(TASK, build=build, **{part: step}), training=part == "train_step")


def test_a_keras_metric_updated_beside_minimize_is_refused(strategy):
    with strategy.scope():
        metric = keras.metrics.Mean(name="y")

    def step(state, batch):
        metric.update_state(batch["y"])
        return TASK.train_step(state, batch)

    assert "return it instead, as keras_metric(" in refusal(strategy, step)


def test_noise_may_be_drawn_beside_minimize_and_moves_its_seed(strategy):
    def build():
        return State(**TASK.build().parts, noise=keras.random.SeedGenerator(3))

    def step(state, batch):
        noise = keras.random.normal([3], seed=state.noise)
        drawn = mean(noise, tf.ones([3]))
        return {**TASK.train_step(state, batch), "noise": drawn}

    state, _, call = toy.compiled(strategy, dataclasses.replace(TASK, build=build, train_step=step))
    drawn = [call(1).sums[2] for _ in range(3)]
    assert len(set(drawn)) == 3
    for local in strategy.experimental_local_results(state.noise.state.value):
        assert local.numpy()[1] == 3  # one draw a step, on each replica


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            lambda s, b: (({"x": b["x"]}), s.optimizer, s.model.trainable_variables),
            "the dict of the step with its 'weight'",
        ),
        (lambda s, b: ((b["x"], b["y"]), s.optimizer, s.model.trainable_variables), "minimize got tuple as its batch"),
        (lambda s, b: (b, None, s.model.trainable_variables), "minimize got a NoneType as its optimizer"),
        (lambda s, b: (b, s.optimizer, s.model), "expected model.trainable_variables or a list"),
        (lambda s, b: (b, s.optimizer, s.model.trainable_variables * 2), "minimize got a variable twice"),
        (lambda s, b: (b, STRANGER, s.model.trainable_variables), "an optimizer that is not in the State"),
    ],
)
def test_arguments_of_minimize_that_cannot_work_are_refused(arguments, sentence):
    def step(state, batch):
        batch, optimizer, variables = arguments(state, batch)
        return minimize(lambda b: tf.square(state.model(b["x"])[:, 0]), batch, optimizer, variables)

    assert sentence in refusal(tf.distribute.get_strategy(), step)


def test_minimize_in_a_branch_is_refused(mirrored):
    def step(state, batch):
        tf.cond(state.step > 0, lambda: TASK.train_step(state, batch)["loss"].parts[0], lambda: 0.0)
        return TASK.train_step(state, batch)

    assert "stands in a branch, a loop or a tf.function within the step" in refusal(mirrored, step)


def test_a_step_that_is_a_tf_function_is_refused(strategy):
    assert "the step is a tf.function; give the plain function" in refusal(strategy, tf.function(TASK.train_step))


def test_a_step_that_applies_an_optimizer_itself_is_refused(strategy):
    def step(state, batch):
        metrics = TASK.train_step(state, batch)
        variables = state.model.trainable_variables
        state.optimizer.apply([tf.zeros_like(v.value) for v in variables], variables)
        return metrics

    assert "the step applies an optimizer itself" in refusal(strategy, step)


def test_a_mean_teacher_may_be_assigned_in_the_step(strategy):
    def build():
        return State(**TASK.build().parts, teacher=keras.Variable(np.zeros([3, 4], np.float32), trainable=False))

    def step(state, batch):
        metrics = TASK.train_step(state, batch)
        student = tf.convert_to_tensor(state.model.trainable_variables[0].value)
        state.teacher.assign(0.5 * tf.convert_to_tensor(state.teacher.value) + 0.5 * student)
        return metrics

    state, _, call = toy.compiled(strategy, dataclasses.replace(TASK, build=build, train_step=step))
    call(1)
    student = state.model.trainable_variables[0].numpy()
    for local in strategy.experimental_local_results(state.teacher.value):
        np.testing.assert_allclose(local.numpy(), 0.5 * student, rtol=1e-6)


def test_a_refusal_from_within_a_layer_is_one_sentence(strategy):
    class Writing(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seen = self.add_weight(name="seen", shape=[], initializer="zeros", trainable=False)
            self.built = True

        def call(self, x):
            self.seen.assign_add(1.0)
            return x

    def build():
        return State(**TASK.build().parts, writing=Writing())

    def step(state, batch):
        state.writing(batch["x"])
        return TASK.train_step(state, batch)

    with pytest.raises(UsageError) as refused:
        toy.compiled(strategy, dataclasses.replace(TASK, build=build, train_step=step))
    assert str(refused.value).startswith("a layer writes 'writing")
    assert "\n" not in str(refused.value)


def test_an_optimizer_whose_slots_have_the_same_names_is_saved_by_number(strategy):
    def build():
        return State(model=TASK.build().model, optimizer=keras.optimizers.Adafactor(0.1))

    state, _, call = toy.compiled(strategy, dataclasses.replace(TASK, build=build))
    call(1)
    assert len([name for name in toy.to_numpy(state) if name.startswith("optimizer/")]) == len(
        state.optimizer.variables
    )
