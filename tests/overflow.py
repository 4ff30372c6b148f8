"""Train in mixed_float16 with an infinity on exactly one replica in one step, and the run that leaves this step out."""

import keras
import numpy as np
import tensorflow as tf

from distloop import RunConfig, State, minimize
from distloop.data import make_stream, per_replica_batches
from distloop.steps import compile_steps, separate_seeds
from distloop.task import named_variables
from distloop.updates import prepare

BATCH, STEPS, BAD_STEP = 8, 5, 2
CONFIG = RunConfig(precision="mixed_float16", ema_momentum=0.9, initial_loss_scale=1024.0, clip_global_norm=1.0)
GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=[BATCH * STEPS, 4]).astype(np.float32)


def data(bad_replica, replicas):
    factor = np.ones(len(X), np.float32)
    if bad_replica is not None:
        factor[BAD_STEP * BATCH + bad_replica * (BATCH // replicas)] = 1e38  # times the loss scale: infinite
    return {"x": X, "y": np.tanh(X.sum(axis=1)), "factor": factor}


def net(name):
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    head = keras.layers.Dense(4 if name == "generator" else 1, dtype="float32")
    return keras.Sequential([keras.Input([4]), *layers, head], name=name)


def build_plain():
    return State(model=net("model"), optimizer=keras.optimizers.Adam(0.01))


def plain_step(state, batch):
    def loss(b):
        return tf.square(state.model(b["x"], training=True)[:, 0] - b["y"]) * b["factor"]

    return minimize(loss, batch, state.optimizer, state.model.trainable_variables)


def build_gan():
    generator, critic = net("generator"), net("critic")
    optimizers = keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01)
    optimizers[0].build(critic.trainable_variables)
    optimizers[1].build(generator.trainable_variables)
    return State(generator=generator, critic=critic, first=optimizers[0], second=optimizers[1])


def critic_step(state, batch):
    def loss(b):
        fake = state.generator(b["x"])
        return tf.nn.softplus(state.critic(fake)[:, 0]) + tf.nn.softplus(-state.critic(b["x"], training=True)[:, 0])

    return minimize(loss, batch, state.first, state.critic.trainable_variables, name="critic")


def gan_step(state, batch):
    metrics = critic_step(state, batch)

    def loss(b):
        return tf.nn.softplus(-state.critic(state.generator(b["x"], training=True))[:, 0]) * b["factor"]

    return metrics | minimize(loss, batch, state.second, state.generator.trainable_variables, name="generator")


# how to build, the step, and what is left of it where the overflowing update is skipped
CASES = {"plain": (build_plain, plain_step, None), "gan": (build_gan, gan_step, critic_step)}


def run(strategy, case, bad_replica):
    """Return what every local replica holds after each step, and the metrics of each; None skips the bad step."""
    build, step, rest_of_step = CASES[case]
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with strategy.scope():
            state = build()
            prepare(state, CONFIG)
    finally:
        keras.config.set_dtype_policy("float32")
    separate_seeds(strategy, state)
    stream = make_stream(
        data(bad_replica, strategy.num_replicas_in_sync), name="data", global_batch_size=BATCH, seed=None
    )

    def compiled(step, first_step):
        dataset = strategy.distribute_datasets_from_function(
            lambda context: per_replica_batches(stream, context, first_step=first_step)
        )
        return compile_steps(strategy, step, state, dataset, training=True, stop=tf.Variable(0.0))

    if bad_replica is not None:
        calls = [compiled(step, 0)] * STEPS
    else:
        calls = [compiled(step, 0)] * BAD_STEP
        calls += [compiled(rest_of_step, BAD_STEP)] if rest_of_step else [None]
        calls += [compiled(step, BAD_STEP + 1)] * (STEPS - BAD_STEP - 1)
    snapshots, sums = [], None
    for call in calls:
        if call is not None:
            sums = call(1).sums
        snapshots.append({**held_by_replicas(state), "sums": sums})
    return snapshots


def held_by_replicas(state):
    return {
        f"{replica}:{name}": tf.convert_to_tensor(local).numpy()
        for name, variable in named_variables(state).items()
        for replica, local in enumerate(getattr(variable, "values", [variable]))
    }


def in_workers(strategy):
    """Return every run of both cases, with the overflow on each worker in turn, as arrays by `case|bad|step|name`."""
    runs = {
        f"{case}|{bad}": run(strategy, case, bad)
        for case in CASES
        for bad in (None, *range(strategy.num_replicas_in_sync))
    }
    return {
        f"{name}|{step}|{key}": value
        for name, snapshots in runs.items()
        for step, snapshot in enumerate(snapshots)
        for key, value in snapshot.items()
    }
