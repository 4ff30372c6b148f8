"""Whether a dataset gives the same elements in the same order each time: its graph is looked at."""

import re
from typing import Any

import tensorflow as tf

from distloop.errors import UsageError

# Operations that draw anew each time they run, whatever their seed; the stateless ones are not among them.
_DRAWS = re.compile(
    "Random(Uniform|UniformInt|StandardNormal|Gamma|Poisson|PoissonV2|Shuffle)|TruncatedNormal|"
    "ParameterizedTruncatedNormal|Multinomial|SampleDistortedBoundingBox(V2)?|"
    "Stateful(Uniform|UniformInt|UniformFullInt|StandardNormal|StandardNormalV2|TruncatedNormal|RandomBinomial)|"
    "RngReadAndSkip|RngSkip|.*CandidateSampler"
)
_SHUFFLES = re.compile("Shuffle(AndRepeat)?Dataset(V2|V3)?")
_RANDOMS = re.compile("RandomDataset(V2)?")


def check_deterministic(dataset: tf.data.Dataset, name: str) -> None:
    """Raise UsageError if `dataset` (called `name`) shuffles, draws random numbers, or lets the order vary.

    What Python computes (`from_generator`, `py_function`) and what files hold cannot be seen.
    """
    policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    try:
        serialized: Any = dataset._as_serialized_graph(external_state_policy=policy)
        graph: Any = tf.compat.v1.GraphDef.FromString(serialized.numpy())
    except Exception as error:  # above 2 GB
        raise UsageError(
            f"the graph of {name} cannot be looked at ({type(error).__name__}); if it is made of large arrays, give "
            "the dict of arrays itself."
        ) from error
    for nodes in [graph.node, *(function.node_def for function in graph.library.function)]:
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            _check_node(node, by_name, name)


def _check_node(node: Any, by_name: dict[str, Any], name: str) -> None:
    if _SHUFFLES.fullmatch(node.op) and not _is_fixed(node, "reshuffle_each_iteration", by_name, node.input[2:4]):
        raise UsageError(
            f"{name} shuffles by itself, so that a resumed run could not repeat its order; drop .shuffle() (the "
            "library shuffles) and list files with shuffle=False, or fix a selection with "
            ".shuffle(..., seed=1, reshuffle_each_iteration=False)."
        )
    if _RANDOMS.fullmatch(node.op) and not _is_fixed(node, "rerandomize_each_iteration", by_name, node.input[:2]):
        raise UsageError(
            f"{name} draws random numbers without a seed (Dataset.random, sample_from_datasets); give it seed=1."
        )
    if _DRAWS.fullmatch(node.op):
        raise UsageError(
            f"{name} draws random numbers ({node.op}) that a resumed run could not repeat; draw them with "
            "tf.random.stateless_uniform and its like in Pipeline(..., augment=function), which is given a seed."
        )
    if node.attr["deterministic"].s == b"false" or node.attr["sloppy"].b:
        raise UsageError(f"{name} lets the order vary ({node.op}); drop deterministic=False.")


def _is_fixed(node: Any, repeat_differs: str, by_name: dict[str, Any], seeds: Any) -> bool:
    """Return whether a shuffling or drawing dataset is the same in each pass: seeded by constants other than 0."""
    given = [by_name.get(seed.partition(":")[0]) for seed in seeds]
    constants = [one.attr["value"].tensor.int64_val for one in given if one is not None and one.op == "Const"]
    seeded = len(constants) == 2 and any(value[:1] != [0] for value in map(list, constants) if value)
    return seeded and not node.attr[repeat_differs].b
