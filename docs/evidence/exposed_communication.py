"""What communication costs a step: two hosts of one core, joined at a given rate. Needs root, iproute2 and taskset.

python docs/evidence/exposed_communication.py dense 1e9 1024      # model, bits a second, examples a host

Exposed is what a step takes longer than one that exchanges nothing. All kinds of step are compiled in the same two
processes and take turns; medians, with the least and the most.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
PORT, ROUNDS = 12345, 7
NOTHING, DEFAULT = "nothing exchanged", "one pack"
KINDS: dict[str, dict[str, Any]] = {
    NOTHING: {},
    DEFAULT: dict(bytes_per_pack=0),
    "automatic packs": {},
    "packs of 1 MB": dict(bytes_per_pack=1_000_000),
    "packs of 16 MB": dict(bytes_per_pack=16_000_000),
    "one pack, bfloat16": dict(bytes_per_pack=0, wire_dtype="bfloat16"),
    "automatic, bfloat16": dict(wire_dtype="bfloat16"),
    "automatic, float16": dict(wire_dtype="float16"),
    "automatic, XLA": dict(jit_compile=True),
}


def dense(config: Any) -> Any:
    """Return the task of 20 layers of 1024 x 1024 weights: 84 MB of float32 gradients."""
    import keras
    import numpy as np

    from distloop import State, Task, minimize

    def build() -> State:
        model = keras.Sequential([keras.Input([1024]), *(keras.layers.Dense(1024, "relu") for _ in range(20))])
        return State(model=model, optimizer=keras.optimizers.SGD(1e-3))

    def step(state: State, batch: Any) -> Any:
        def loss(batch: Any) -> Any:
            return keras.losses.mean_squared_error(batch["x"], state.model(batch["x"]))

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    x = np.random.default_rng(0).normal(size=[config.global_batch_size, 1024]).astype(np.float32)
    return Task(build, step, lambda: {"x": x})


def transformer(config: Any) -> Any:
    """Return a GPT of 14 M weights, 55 MB of float32 gradients, on sequences of 128 tokens."""
    from distloop.tasks import gpt2_124m

    sizes = dict(layers=6, width=384, heads=6, vocabulary=8192, length=128)
    return gpt2_124m.make_task(config, **sizes, dropout=0.0, examples=config.global_batch_size)


def worker(model: str, batch: str, kinds: list[str]) -> None:
    """Measure all kinds in turn; worker 0 prints {kind: [seconds a step]}."""
    from benchmarks import feeding, leave_out, measuring
    from distloop import cluster, startup
    from distloop.config import RunConfig
    from distloop.lifecycle import Lifecycle
    from distloop.steps import compile_steps
    from distloop.storage import as_path
    from distloop.updates import UpdateRule, set_rule

    workers = cluster.from_tf_config(os.environ["TF_CONFIG"])
    config = RunConfig(workdir="none", global_batch_size=int(batch) * workers.num_workers)
    task = {"dense": dense, "transformer": transformer}[model](config)
    life = Lifecycle(workers)
    strategy = startup.start_strategy(task, config, workers)
    with life.telling(), life.listening() as stop:
        setup = startup.set_up(task, config, as_path("none"), workers, *strategy)
        batches = feeding.dataset(setup, startup.train_stream(setup), "step")
        agreed = measuring.agreed_on(setup.strategy)
        calls = {}
        for name in kinds:
            set_rule(setup.state.optimizer, UpdateRule(**KINDS[name]))
            with leave_out.reduction() if name == NOTHING else leave_out.nothing([]):
                calls[name] = compile_steps(
                    setup.strategy, task.train_step, setup.state, batches, training=True, stop=stop
                )
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        order = random.Random(0)  # the same on both, another in each round
        for round_number in range(1 + ROUNDS):
            for name in order.sample(kinds, len(kinds)):
                agreed(0.0)  # both begin together
                began = time.perf_counter()
                calls[name](1)
                agreed(0.0)
                if round_number:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        life.leave_together()
    if workers.is_chief:
        print(json.dumps(seconds))


def main(model: str, rate: str, batch: str, *others: str) -> None:
    """Start a worker on each of two hosts, and print a table."""
    from tests import namespaces

    kinds = [NOTHING, DEFAULT, *(others or [name for name in KINDS if name not in (NOTHING, DEFAULT)])]
    addresses = [f"10.77.0.{k + 1}:{PORT}" for k in range(2)]
    with namespaces.hosts(2) as hosts:
        started = []
        for k, host in enumerate(hosts):
            host.limit(float(rate) / 8)
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": k}}
            command = ["ip", "netns", "exec", host.namespace, "taskset", "-c", str(k), sys.executable, __file__]
            environment = {**os.environ, "TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "2"}
            started.append(subprocess.Popen([*command, model, batch, *kinds], env=environment, stdout=subprocess.PIPE))
        out, _ = [process.communicate()[0] for process in started]
    seconds = json.loads(out.splitlines()[-1])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{model}, {float(rate) / 1e6:g} Mbit/s, {batch} examples a host: ms a step")
    for name, values in seconds.items():
        exposed = middle[name] - middle[NOTHING]
        share = exposed / (middle[DEFAULT] - middle[NOTHING])
        spread = f"({1000 * min(values):.0f} to {1000 * max(values):.0f})"
        print(
            f"{name:20}{1000 * middle[name]:7.0f} {spread:18} exposed {1000 * exposed:6.0f}, {share:.2f} of one pack's"
        )


if __name__ == "__main__":
    if "TF_CONFIG" in os.environ:
        worker(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        main(*sys.argv[1:])
