"""What happens between the reduction and the update: clipping, transforms, accumulation, averages, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import RunConfig, State, mean, minimize
from distloop.errors import UsageError
from distloop.metrics import Metric, reduce_and_pack
from distloop.precision import Scaling
from distloop.updates import UpdateRule, check_optimizer, prepare, rule_of, set_rule
from tests.shared_step import exchanges, run_step

GRADIENTS = np.array([[3.0, 0.0], [6.0, 0.0]], np.float32)  # of one example each: two replicas hold one apiece


def weights(strategy, optimizer=None, start=(0.0, 0.0)):
    """Return a state with one variable `[2]`; the loss x * w has the gradient x."""
    with strategy.scope():
        layer = keras.layers.Dense(1, use_bias=False)
        layer.build((None, 2))
        layer.kernel.assign(np.array(start, np.float32)[:, None])
        return State(layer=layer, optimizer=optimizer or keras.optimizers.SGD(1.0))


def update(strategy, rule, x=GRADIENTS, *, transform=None, start=(0.0, 0.0)):
    """Return what one update adds to the weights, on each replica."""
    state = weights(strategy, start=start)
    set_rule(state.optimizer, rule)

    def step(batch):
        return minimize(
            lambda b: state.layer(b["x"])[:, 0],
            batch,
            state.optimizer,
            state.layer.trainable_variables,
            transform=transform,
        )

    run_step(strategy, step, {"x": np.asarray(x, np.float32)})
    return [k.numpy()[:, 0] - start for k in strategy.experimental_local_results(state.layer.kernel.value)]


@pytest.mark.parametrize("rule", [UpdateRule(clip_global_norm=1.0), UpdateRule(clip_norm=1.0)])
def test_clip_norm_1_of_replica_gradients_3_and_6_is_an_update_of_norm_1(strategy, rule):
    for change in update(strategy, rule):
        np.testing.assert_allclose(change, [-1.0, 0.0], rtol=1e-6)  # Keras's own would let through 2


def test_clip_value_is_of_the_mean_over_all_replicas(strategy):
    x = np.array([[4.0, -1.0], [-3.0, -1.0]], np.float32)  # mean 0.5, -1: only the second exceeds 0.75
    for change in update(strategy, UpdateRule(clip_value=0.75), x):
        np.testing.assert_allclose(change, [-0.5, 0.75], rtol=1e-6)


def test_a_norm_below_the_limit_is_left_alone(strategy):
    for change in update(strategy, UpdateRule(clip_global_norm=10.0, clip_norm=10.0, clip_value=10.0)):
        np.testing.assert_allclose(change, [-4.5, 0.0], rtol=1e-6)


def test_a_transform_gets_the_reduced_clipped_gradients_and_the_variables(strategy):
    def transform(gradients, variables):
        (gradient,), (variable,) = gradients, variables
        return [2.0 * gradient + tf.convert_to_tensor(variable.value)]

    for change in update(strategy, UpdateRule(clip_global_norm=1.0), transform=transform, start=(10.0, 5.0)):
        np.testing.assert_allclose(change, [-(2.0 + 10.0), -5.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [lambda g, v: [], lambda g, v: [g[0][0]]])
def test_a_transform_that_loses_gradients_is_refused(bad):
    with pytest.raises(UsageError, match="expected a list with one for each of the 1 variables, of its shape"):
        update(tf.distribute.get_strategy(), UpdateRule(), transform=bad)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_update_of_the_whole_batch_with_one_reduction(mirrored, parts):
    x = np.arange(16, dtype=np.float32).reshape([8, 2])
    (expected, _), (ours, other) = (
        update(mirrored, UpdateRule(), x),
        update(mirrored, UpdateRule(micro_batches=parts), x),
    )
    np.testing.assert_allclose(ours, -x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_array_equal(ours, other)


def test_the_gradient_norm_of_a_sparse_gradient_adds_up_its_repeated_rows(strategy):
    with strategy.scope():
        table = keras.layers.Embedding(3, 1, embeddings_initializer="zeros")
        table.build()
        state = State(table=table, optimizer=keras.optimizers.SGD(1.0))
    set_rule(state.optimizer, UpdateRule(gradient_norm=True))

    def step(batch):
        return minimize(lambda b: state.table(b["id"])[:, 0], batch, state.optimizer, table.trainable_variables)

    # ids 0, 0, 0, 1: the gradient is (3/4, 1/4, 0)
    for metrics in run_step(strategy, step, {"id": np.array([0, 0, 0, 1])}):
        norm, count = metrics["gradient_norm"]
        assert count == 1
        np.testing.assert_allclose(norm, np.hypot(0.75, 0.25), rtol=1e-6)


def test_a_sparse_gradient_with_adam_moves_as_the_dense_one_would(strategy):
    ids = np.array([0, 2, 2, 1])
    results = []
    for dense in (False, True):
        with strategy.scope():
            table = keras.layers.Embedding(4, 2, embeddings_initializer="ones")
            table.build()
            state = State(table=table, optimizer=keras.optimizers.Adam(0.1))

        def step(batch, dense=dense, state=state, table=table):
            def loss(b):
                if dense:
                    rows = tf.one_hot(b["id"], 4) @ tf.convert_to_tensor(table.embeddings.value)
                else:
                    rows = state.table(b["id"])
                return tf.reduce_sum(tf.square(rows), axis=1)

            return minimize(loss, batch, state.optimizer, table.trainable_variables)

        for _ in range(3):
            run_step(strategy, step, {"id": ids})
        results.append([v.numpy() for v in strategy.experimental_local_results(table.embeddings.value)])
    for sparse, expected in zip(*results, strict=True):
        np.testing.assert_allclose(sparse, expected, rtol=1e-5)


def test_the_average_of_the_weights_has_its_closed_form_and_evaluates(strategy):
    state = weights(strategy)
    with strategy.scope():
        prepare(state, RunConfig(ema_momentum=0.9))

    def step(batch):
        return minimize(lambda b: state.layer(b["x"])[:, 0], batch, state.optimizer, state.layer.trainable_variables)

    for _ in range(5):
        run_step(strategy, step, {"x": GRADIENTS})  # each moves the weight by -4.5
    expected = 0.0
    for number in range(1, 6):
        expected = 0.9 * expected + 0.1 * (-4.5 * number)
    (average,) = [variable for name, variable in state.added.items() if name.startswith("average/")]
    for local in strategy.experimental_local_results(average):
        np.testing.assert_allclose(local.numpy()[:, 0], [expected, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        (dict(clipnorm=1.0), "has clipnorm=1.0, .*use --clip_norm"),
        (dict(clipvalue=0.5), "has clipvalue=0.5, .*use --clip_value"),
        (dict(global_clipnorm=1.0), "has global_clipnorm=1.0, .*use --clip_global_norm"),
        (dict(gradient_accumulation_steps=2), "has gradient_accumulation_steps=2, .*use --micro_batches"),
        (dict(use_ema=True), "has use_ema=True, .*use --ema_momentum"),
        (dict(loss_scale_factor=8.0), "has loss_scale_factor=8.0, .*use --loss_scale"),
    ],
)
def test_an_optimizer_that_decides_on_local_gradients_is_refused_with_our_setting(settings, ours):
    with pytest.raises(UsageError, match=ours):
        check_optimizer(keras.optimizers.SGD(0.1, **settings))
    strategy = tf.distribute.get_strategy()
    with pytest.raises(UsageError, match=ours):
        prepare(weights(strategy, keras.optimizers.SGD(0.1, **settings)), RunConfig())


def test_a_keras_loss_scale_optimizer_is_refused_with_our_setting():
    with pytest.raises(UsageError, match="pass its inner optimizer and --precision=mixed_float16"):
        check_optimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))


@pytest.mark.parametrize(
    ("rule", "statistics"),
    [
        (UpdateRule(), False),
        (UpdateRule(micro_batches=4), False),
        (UpdateRule(clip_global_norm=1.0, gradient_norm=True), False),
        (UpdateRule(), True),
    ],
)
def test_one_packed_reduction_a_step_whatever_is_asked_for(mirrored, rule, statistics):
    with mirrored.scope():
        norm = [keras.layers.BatchNormalization()] if statistics else []
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(4), *norm, keras.layers.Dense(1)])
        state = State(model=model, optimizer=keras.optimizers.Adam(0.1))
    set_rule(state.optimizer, rule)

    def step(batch):
        return minimize(
            lambda b: state.model(b["x"], training=True)[:, 0], batch, state.optimizer, model.trainable_variables
        )

    assert exchanges(mirrored, step, {"x": np.ones([8, 2], np.float32)}) == ["AddN"]


def test_the_loss_scale_and_the_finite_test_add_no_reduction(mirrored):
    with mirrored.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(4), keras.layers.Dense(1)])
        state = State(model=model, optimizer=keras.optimizers.Adam(0.1))
        prepare(state, RunConfig(precision="mixed_float16", ema_momentum=0.9))

    def step(batch):
        return minimize(lambda b: state.model(b["x"])[:, 0], batch, state.optimizer, model.trainable_variables)

    assert exchanges(mirrored, step, {"x": np.ones([8, 2], np.float32)}) == ["AddN"]


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (lambda: [keras.layers.BatchNormalization(synchronized=True)], ["CollectiveReduceV2"] * 6),
        (lambda: [keras.layers.Embedding(3, 2), keras.layers.Flatten()], ["ConcatV2"] * 2),
    ],
)
def test_what_adds_exchanges_adds_what_the_design_page_says(mirrored, layers, more):
    with mirrored.scope():
        model = keras.Sequential([keras.Input([2]), *layers(), keras.layers.Dense(1)])
        state = State(model=model, optimizer=keras.optimizers.Adam(0.1))

    def step(batch):
        variables = state.model.trainable_variables
        return minimize(lambda b: state.model(b["x"], training=True)[:, 0], batch, state.optimizer, variables)

    found = exchanges(mirrored, step, {"x": np.ones([8, 2], np.float32)})
    assert sorted(found) == sorted([*more, "AddN"])


def test_metrics_beside_minimize_share_one_more_reduction(mirrored):
    with mirrored.scope():
        state = weights(mirrored)

    def step(batch):
        variables = state.layer.trainable_variables
        metrics = minimize(lambda b: state.layer(b["x"])[:, 0], batch, state.optimizer, variables)
        beside = {name: mean(batch["x"][:, 0], batch["weight"]) for name in ("one", "two")}
        packed, _ = reduce_and_pack({**metrics, **beside}, tf.zeros([2]), None)
        return {"packed": Metric((packed,), float)}

    assert exchanges(mirrored, step, {"x": GRADIENTS}) == ["AddN"] * 2


def test_the_settings_of_a_run_reach_minimize():
    settings = dict(clip_global_norm=1.0, clip_norm=2.0, clip_value=3.0, gradient_norm=True, micro_batches=4)
    state = weights(tf.distribute.get_strategy())
    prepare(state, RunConfig(**settings, jit_compile=True, ema_momentum=0.75))
    rule = rule_of(state.optimizer)
    assert {name: getattr(rule, name) for name in settings} == settings
    assert (rule.jit_compile, rule.ema_momentum, rule.loss_scale) == (True, 0.75, None)
    assert set(rule.averages) == {id(state.layer.kernel)}


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, Scaling(2.0**15, 2000, 2.0, 0.5, 1.0)),
        (
            dict(
                initial_loss_scale=64.0,
                loss_scale_growth_steps=7,
                loss_scale_growth_factor=4.0,
                loss_scale_backoff_factor=0.25,
                min_loss_scale=8.0,
            ),
            Scaling(64.0, 7, 4.0, 0.25, 8.0),
        ),
    ],
)
def test_the_loss_scale_of_a_run_is_as_its_flags_say(settings, scaling):
    state = weights(tf.distribute.get_strategy())
    prepare(state, RunConfig(precision="mixed_float16", **settings))
    assert rule_of(state.optimizer).loss_scale.scaling == scaling


def test_a_static_loss_scale_neither_grows_nor_shrinks():
    state = weights(tf.distribute.get_strategy())
    prepare(state, RunConfig(precision="mixed_float16", loss_scale=64.0))
    loss_scale = rule_of(state.optimizer).loss_scale
    for finite in (True, False, True):
        loss_scale.update(tf.constant(finite))
        assert float(loss_scale.scale.numpy()) == 64.0
    assert loss_scale.scaling.growth_steps > 2**60


def test_jit_compile_compiles_forward_and_backward_by_xla():
    state = weights(tf.distribute.get_strategy())
    compiled = {}
    for jit in (False, True):
        set_rule(state.optimizer, UpdateRule(jit_compile=jit))

        def step(batch):
            variables = state.layer.trainable_variables
            metrics = minimize(lambda b: state.layer(b["x"])[:, 0], batch, state.optimizer, variables)
            return metrics["loss"].parts

        batch = {"x": tf.constant(GRADIENTS), "weight": tf.ones([2])}
        graph = tf.function(step, autograph=False).get_concrete_function(batch).graph.as_graph_def()
        functions = [f for f in graph.library.function if f.attr["_XlaMustCompile"].b]
        compiled[jit] = {node.op for function in functions for node in function.node_def}
    assert compiled[False] == set()
    assert "MatMul" in compiled[True]
    assert not any("Collective" in op or "Assign" in op for op in compiled[True])


def test_the_logged_gradient_norm_is_from_before_clipping(strategy):
    state = weights(strategy)
    set_rule(state.optimizer, UpdateRule(gradient_norm=True, clip_value=0.5, clip_norm=0.25))

    def step(batch):
        return minimize(lambda b: state.layer(b["x"])[:, 0], batch, state.optimizer, state.layer.trainable_variables)

    for metrics in run_step(strategy, step, {"x": GRADIENTS}):
        np.testing.assert_allclose(metrics["gradient_norm"], [4.5, 1.0], rtol=1e-6)


def test_micro_batches_hand_on_what_layers_write():
    state = weights(tf.distribute.get_strategy())
    noise = keras.random.SeedGenerator(1)
    set_rule(state.optimizer, UpdateRule(micro_batches=4))

    def step(batch):
        def loss(b):
            return state.layer(b["x"])[:, 0] * keras.random.normal([2], seed=noise)

        return minimize(loss, batch, state.optimizer, state.layer.trainable_variables)

    run_step(tf.distribute.get_strategy(), step, {"x": np.ones([8, 2], np.float32)})
    assert noise.state.numpy()[1] == 4  # one draw a micro-batch


def test_a_transform_with_noise_of_its_own_on_each_replica_is_refused(strategy):
    noise = keras.random.SeedGenerator(1)

    def transform(gradients, variables):
        return [g + keras.random.normal(g.shape, seed=noise) for g in gradients]

    with pytest.raises(UsageError, match=r"transform writes '.*seed_generator_state', .*stateless_normal"):
        update(strategy, UpdateRule(), transform=transform)


@pytest.mark.parametrize("penalty", ["activity", "vector"])
def test_a_penalty_that_is_no_scalar_of_the_weights_is_refused(strategy, penalty):
    with strategy.scope():
        layer = keras.layers.Dense(
            1, activity_regularizer=keras.regularizers.L2(0.1) if penalty == "activity" else None
        )
        layer.build((None, 2))
        state = State(layer=layer, optimizer=keras.optimizers.SGD(1.0))

    def step(batch):
        return minimize(
            lambda b: state.layer(b["x"])[:, 0],
            batch,
            state.optimizer,
            state.layer.trainable_variables,
            penalty=lambda: sum(state.layer.losses) if penalty == "activity" else state.layer.kernel.value,
        )

    sentence = "losses that depend on the examples" if penalty == "activity" else "expected a scalar: sum"
    with pytest.raises(UsageError, match=sentence):
        run_step(strategy, step, {"x": GRADIENTS})
