"""The sum over replicas between processes: how many collectives it takes, and what 16 bits on the wire change."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from distloop import State, minimize
from distloop.reduction import all_reduce_sum
from distloop.updates import UpdateRule, set_rule
from tests import in_workers
from tests.shared_step import exchanges, run_step

REPLICAS = 4  # two processes of two
GENERATOR = np.random.default_rng(1)
# Gradients of all sizes, and in the last column such that only their sum over the batch is more than float16 holds.
X = (GENERATOR.normal(size=[8, 64]) * np.logspace(-6, 3, 64)).astype(np.float32)
X[:, -1] = 3e4
IDS = GENERATOR.integers(0, 5, size=[8, 3])  # of 9 rows: some come twice, some never
WEIGHT = np.array([4096, 1, 0.5, 0, 2, 1, 1, 1], np.float32) / 512  # neither these nor their sum fit in bfloat16
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}  # relative, of one number
SMALLEST = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25}  # absolute, of a number near 0


def state_of(strategy, layers, rule):
    with strategy.scope():
        model = keras.Sequential([keras.Input([64]), *layers])
        state = State(model=model, optimizer=keras.optimizers.SGD(1.0))
    set_rule(state.optimizer, rule)
    return state


def count_collectives(strategy):
    """Return how many one replica makes in a step of four dense layers, 16.6 kB of gradients each, or 4 MB but one."""
    rules = {
        "automatic": (64, UpdateRule()),
        "automatic, large": (1024, UpdateRule()),
        "all at once": (64, UpdateRule(bytes_per_pack=0)),
        "two layers": (64, UpdateRule(bytes_per_pack=33_000)),
        "one layer": (64, UpdateRule(bytes_per_pack=16_600)),
        "16 bits": (64, UpdateRule(wire_dtype="bfloat16")),
        "two layers of 16 bits": (64, UpdateRule(wire_dtype="bfloat16", bytes_per_pack=16_500)),
    }
    found = {}
    for name, (width, rule) in rules.items():
        state = state_of(strategy, [keras.layers.Dense(width) for _ in range(4)], rule)

        def step(batch, state=state):
            losses = lambda b: tf.reduce_sum(state.model(b["x"]), axis=1)  # noqa: E731
            return minimize(losses, batch, state.optimizer, state.model.trainable_variables)

        made = exchanges(strategy, step, {"x": X})
        assert set(made) == {"CollectiveReduceV2"}
        found[name] = len(made)
    return found


def test_a_small_model_takes_one_collective_and_smaller_packs_take_more(tmp_path):
    for found in in_workers.run("tests.test_reduction:count_collectives", tmp_path / "count"):
        assert {name: int(count) for name, count in found.items()} == {
            "automatic": 1,
            "automatic, large": 4,
            "all at once": 1,
            "two layers": 2,
            "one layer": 4,
            "16 bits": 2,  # all but the gradients travel in float32
            "two layers of 16 bits": 3,
        }


def order(strategy):
    """Return, for a step of three packs, how many of them wait for another one before they leave."""

    def three_packs():
        return all_reduce_sum([tf.ones([4]), tf.ones([5]), tf.ones([6])], bytes_per_pack=1)

    traced = tf.function(lambda: strategy.run(three_packs), autograph=False).get_concrete_function()
    nodes = {node.name: node for node in traced.graph.as_graph_def().node}
    packs = [node for node in nodes.values() if node.op == "CollectiveReduceV2"]
    waits = [name for pack in packs for name in pack.input if name.startswith("^") and "Collective" in name]
    return {"packs": len(packs), "waits": len(waits), "threads": tf.config.threading.get_inter_op_parallelism_threads()}


def test_packs_wait_for_no_other_pack_and_leave_while_a_thread_computes(tmp_path):
    for found in in_workers.run("tests.test_reduction:order", tmp_path / "order"):
        assert (found["packs"], found["waits"]) == (3, 0)
        assert found["threads"] >= 2


def exchange(strategy):
    """Return what one update of a dense and of a sparse variable adds on each replica, and the sums of the loss."""
    found = {}
    for dtype in ROUNDING:
        layers = [keras.layers.Dense(1, use_bias=False), keras.layers.Embedding(9, 2)]
        with strategy.scope():
            layers[0].build((None, 64))
            layers[1].build()
            for layer in layers:
                layer.weights[0].assign(tf.zeros_like(layer.weights[0]))
            optimizer = keras.optimizers.SGD(1.0)
            optimizer.build([layer.weights[0] for layer in layers])
            state = State(dense=layers[0], table=layers[1], optimizer=optimizer)
        set_rule(state.optimizer, UpdateRule(wire_dtype=dtype))

        def step(batch, state=state, layers=layers):
            def losses(b):
                return layers[0](b["x"])[:, 0] + tf.reduce_sum(layers[1](b["ids"]), axis=[1, 2])

            variables = [layer.weights[0] for layer in layers]
            return minimize(losses, batch, state.optimizer, variables)

        metrics = run_step(strategy, step, {"x": X, "ids": IDS, "weight": WEIGHT})
        for replica, parts in enumerate(metrics):
            found[f"{dtype}:count:{replica}"] = parts["loss"][1]
            for layer, kind in zip(layers, ("dense", "sparse"), strict=True):
                local = strategy.experimental_local_results(layer.weights[0].value)[replica]
                found[f"{dtype}:{kind}:{replica}"] = local.numpy()
    return found


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    out = tmp_path_factory.mktemp("exchange") / "out"
    return in_workers.run("tests.test_reduction:exchange", out, replicas=REPLICAS // 2)


def replicas_of(exchanged, name):
    return [worker[f"{name}:{replica}"] for worker in exchanged for replica in range(REPLICAS // 2)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_gradient_is_wrong_by_no_more_than_the_rounding_of_the_wire(exchanged, dtype, kind):
    weighted = X * WEIGHT[:, None]
    if kind == "sparse":
        weighted = np.stack([WEIGHT * (row == IDS).sum(axis=1) for row in range(9)], axis=1)
    parts = weighted.astype(np.float64).reshape([REPLICAS, -1, weighted.shape[1]]).sum(axis=1) / len(X)
    exact, scale = parts.sum(axis=0), len(X) / WEIGHT.astype(np.float64).sum()
    # Each part is rounded once, each of the sums on the way once more.
    bound = 2 * REPLICAS * (ROUNDING[dtype] * np.abs(parts).sum(axis=0) + SMALLEST[dtype]) * scale
    bound += 1e-6 * np.abs(parts).sum(axis=0) * scale  # the arithmetic in float32 before and after
    for update in replicas_of(exchanged, f"{dtype}:{kind}"):
        columns = update.reshape([len(exact), -1])
        assert np.all(np.abs(columns + (exact * scale)[:, None]) <= bound[:, None])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_replicas_hold_the_same_bits_and_the_exact_denominator(exchanged, dtype):
    for kind in ("dense", "sparse"):
        first, *others = replicas_of(exchanged, f"{dtype}:{kind}")
        assert all(np.array_equal(first, other) for other in others)
    assert {float(count) for count in replicas_of(exchanged, f"{dtype}:count")} == {float(WEIGHT.sum())}


def test_16_bits_make_a_difference(exchanged):
    updates = [replicas_of(exchanged, f"{dtype}:dense")[0].tobytes() for dtype in ROUNDING]
    assert len(set(updates)) == len(updates)
