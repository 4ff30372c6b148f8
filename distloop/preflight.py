"""What is checked once, before the first step: that sums are right, and that the workers would do the same.

Workers tell each other their texts through TensorFlow's coordination service, not by a reduction: it carries text of
any length, works before the first variable is made, and is not the thing that is being checked.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as tf_context

import distloop
from distloop.cluster import Cluster
from distloop.errors import PreflightError, UsageError
from distloop.reduction import all_reduce_sum
from distloop.task import Task

PATIENCE_SECS = 600  # how long a worker waits for what another one says

# 400 kB of whole numbers up to a prime, whose sums float32 holds exactly up to 2**24 / 8191 = 2048 replicas.
_LARGE, _PERIOD, _SHIFT = 100_000, 8191, 1009
# For each fact what a worker has and what to do; facts of other names get the default.
_SENTENCES = {
    "flags": ("has other flags than worker 0 ({theirs}, not {first})", "start all workers with the same flags"),
    "code": ("runs other code than worker 0 ({theirs}, not {first})", "install the same code for all workers"),
    "data": ("reads other data than worker 0 ({theirs}, not {first})", "give all workers copies of the same data"),
    "evaluation": (
        "evaluates other data than worker 0 ({theirs}, not {first})",
        "give all workers copies of the same data",
    ),
    "replicas": ("has {theirs} replicas, worker 0 {first}", "give all workers the same --replicas and as many GPUs"),
    "checkpoint": (
        "found a checkpoint of step {theirs}, worker 0 of step {first}",
        "give all workers the same --workdir, on storage that they share",
    ),
}
_DEFAULT = ("has {name} {theirs}, worker 0 {first}", "start all workers with the same {name}")
_rounds = itertools.count()  # a key can be set once; all workers take the same rounds in the same order


def check_reduction(strategy: tf.distribute.Strategy, workers: Cluster) -> None:
    """Sum known numbers over all replicas and raise PreflightError on every worker if one replica gets a wrong sum.

    Cross-replica context. A small and a large tensor go the way that gradients go, and the host compares each local
    replica's result. Verdicts travel beside the reduction, so a broken one cannot hide them; one that hangs still does.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return

    def sum_known_numbers() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        index = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)
        # No part is 0 or equal to another's, so a part that is missing, doubled or another's changes the sum.
        small = tf.one_hot(index, replicas) * tf.cast(index + 1, tf.float32)
        large = tf.cast((tf.range(_LARGE) + _SHIFT * index) % _PERIOD + 1, tf.float32)
        return index, all_reduce_sum(small), all_reduce_sum(large)

    call: Any = tf.function(lambda: strategy.run(sum_known_numbers), autograph=False)
    results = call()
    large = sum((np.arange(_LARGE) + _SHIFT * replica) % _PERIOD + 1 for replica in range(replicas))
    expected = [np.arange(replicas) + 1, large]
    wrong = [
        int(index)
        for index, *sums in zip(*map(strategy.experimental_local_results, results), strict=True)
        if not all(np.array_equal(ours, exact) for ours, exact in zip(sums, expected, strict=True))
    ]
    said = from_all_workers(workers, json.dumps(wrong))
    wrong = sorted(index for text in said for index in json.loads(text))
    if wrong:
        which = f"replica {wrong[0]}" if len(wrong) == 1 else f"replicas {', '.join(map(str, wrong))}"
        algorithm = _algorithm(strategy)
        cure = "set NCCL_P2P_DISABLE=1, or use" if "NCCL" in algorithm.upper() else "use"
        raise PreflightError(
            f"the all-reduce over {replicas} replicas by {algorithm} gave {which} a wrong sum of known numbers, and "
            f"training would be wrong too; {cure} another --strategy or fewer replicas, and look for faulty hardware."
        )


def check_workers(workers: Cluster, facts: Mapping[str, object]) -> None:
    """Raise UsageError on every worker, naming the first fact in which one differs from worker 0.

        check_workers(workers, {"flags": config.to_dict(), "code": source_version(task), "checkpoint": start_step})

    A fact is a string, a number or a dict of such (of which only what differs is told); put causes before what follows
    from them. Needs the multiworker strategy, but no collective; one worker communicates nothing.
    """
    said = [json.loads(text) for text in from_all_workers(workers, json.dumps(facts, default=str))]
    for name in dict.fromkeys(name for fact in said for name in fact):
        differing = [worker for worker, fact in enumerate(said) if fact.get(name) != said[0].get(name)]
        if differing:
            worker, *rest = differing
            theirs, first = _difference(said[worker].get(name), said[0].get(name))
            what, cure = _SENTENCES.get(name, _DEFAULT)
            what = what.format(name=name, theirs=theirs, first=first)
            too = f", and worker {', '.join(map(str, rest))} differs too" if rest else ""
            raise UsageError(f"worker {worker} {what}{too}; {cure.format(name=name)}.")


def source_version(task: Task | Callable[..., object]) -> str:
    """Return versions, and checksums of distloop and of the file that defines the train step (or the function)."""
    step = task.train_step if isinstance(task, Task) else task
    while isinstance(step, functools.partial):
        step = step.func
    step = inspect.unwrap(step)
    try:
        file = inspect.getsourcefile(step if inspect.isroutine(step) else type(step))
        source = f"{Path(file).name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}" if file else None
    except (OSError, TypeError):
        source = None
    own = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))
    ours = f"distloop {distloop.__version__} {own.hexdigest()[:12]}"
    return f"{ours}, tensorflow {tf.__version__}, keras {keras.__version__}, {source or 'source unknown'}"


def _algorithm(strategy: tf.distribute.Strategy) -> str:
    """Name what reduces, such as `CollectiveAllReduce (NCCL)`."""
    ops = getattr(strategy.extended, "_cross_device_ops", strategy)
    if type(ops).__name__ != "CollectiveAllReduce":
        return type(ops).__name__
    options: Any = getattr(strategy.extended, "_communication_options", None)
    return f"CollectiveAllReduce ({options.implementation.value})" if options else "CollectiveAllReduce"


def _difference(theirs: object, first: object) -> tuple[str, str]:
    """Describe two values; of two dicts the entries that differ."""
    if not (isinstance(theirs, dict) and isinstance(first, dict)):
        return "nothing" if theirs is None else str(theirs), "nothing" if first is None else str(first)
    names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
    one, other = (", ".join(f"{name}={values.get(name)!r}" for name in names) for values in (theirs, first))
    return one, other


def from_all_workers(workers: Cluster, text: str) -> list[str]:
    """Return what each worker said, in worker order. Waits for all of them."""
    if workers.num_workers == 1:
        return [text]
    # Private, but what TensorFlow's own PreemptionCheckpointHandler uses. The strategy has started the service.
    service: Any = tf_context.context()
    key = f"distloop/preflight/{next(_rounds)}"
    service.set_config_key_value(f"{key}/{workers.index}", text)
    said = []
    for worker in range(workers.num_workers):
        try:
            said.append(service.get_config_key_value(f"{key}/{worker}", timeout_in_ms=PATIENCE_SECS * 1000))
        except tf.errors.DeadlineExceededError as error:
            raise PreflightError(
                f"worker {worker} said nothing for {PATIENCE_SECS} s before the first step, where all workers compare "
                "what they are about to do; look at what it printed last."
            ) from error
    # Worker 0 runs the service: it must not leave (with a UsageError) before all have read. Who fails here has read.
    with contextlib.suppress(tf.errors.OpError):
        service.wait_at_barrier(key, PATIENCE_SECS * 1000)
    return said
