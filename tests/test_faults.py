"""Kill any process at any moment and run the same command again: nothing is lost, to the bit."""

import itertools
import json

import numpy as np
import pytest

from tests import dying, faults
from tests.faults import STEPS, Kill, Run, carry_through
from tests.run_files import checkpoints, complete, differences, state

SECONDS = 4.0  # about an attempt without a kill on two busy cores; for kills by the clock


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Return the function that returns the run without a kill, for a number of workers."""
    made = {}

    def run(workers):
        if workers not in made:
            made[workers], _ = faults.clean(tmp_path_factory.mktemp("clean") / "run", workers=workers)
        return made[workers]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_random_kills_change_nothing(clean, tmp_path, workers):
    """A few of the kills of `python -m tests.faults --kills=200`."""
    ended = list(faults.kill_at_random(tmp_path, clean(workers), kills=4, seed=workers, seconds=SECONDS))
    assert sum(found is not None for _, found in ended) == 4


@pytest.mark.slow
def test_kills_at_chosen_moments_of_two_workers_change_nothing(clean, tmp_path):
    kills = [
        Kill("loading", (1,)),
        Kill("built:1", (0, 1)),  # the variables are there, the checkpoint is not read
        Kill("trace:1", (0,)),
        Kill("end:16", (0, 1)),
        Kill("eval:2", (1,)),
        Kill(f"begin:{STEPS}", (1,)),
        Kill(f"end:{STEPS}", (0,)),
    ]
    run = Run(tmp_path / "run", workers=2)
    attempts = list(carry_through(run, kills))
    assert [(kill, found.killed) for kill, found in attempts] == [*((kill, True) for kill in kills), (None, False)]
    assert differences(run.folder, clean(2).folder) == []


@pytest.mark.slow
def test_a_kill_before_any_operation_of_a_save_changes_nothing(clean, tmp_path):
    """Each attempt dies one operation later: before the data, before the index, before and while old ones go."""
    run = Run(tmp_path / "run")
    begin = Kill("begin:20")  # so that there are checkpoints which are too old
    attempts = list(carry_through(run, [begin, *(Kill(f"save:{number}") for number in range(1, 14))]))
    assert sum(found.killed for _, found in attempts) == len(attempts) - 1
    assert sum(found.doing == "save" for _, found in attempts) >= 6  # its folder is there, its index is not
    assert differences(run.folder, clean(1).folder) == []


@pytest.mark.slow
def test_a_kill_before_other_operations_on_files_changes_nothing(clean, tmp_path):
    run = Run(tmp_path / "run")
    attempts = list(carry_through(run, (Kill(f"file:{number}") for number in itertools.count(1, 3))))
    assert attempts[-1][1].codes == [0]
    assert differences(run.folder, clean(1).folder) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(clean, tmp_path, damage):
    run = Run(tmp_path / "run")
    next(carry_through(run, [Kill("begin:40")]))
    *_, before, newest = [path for path in checkpoints(run.folder) if complete(path)]
    (data,) = newest.glob("*.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content[:-100] if damage == "truncated" else content)
    found = faults.attempt(run, None)
    assert (found.codes, f"step_{found.resumed:08d}") == ([0], before.name), found.errors
    assert f"checkpoint {newest} is damaged" in found.errors
    assert differences(run.folder, clean(1).folder) == []


@pytest.mark.slow
def test_other_numbers_of_workers_and_replicas_go_on_with_the_same_order_and_trajectory(tmp_path):
    reference = Run(tmp_path / "one", task="same_on_all")
    list(carry_through(reference, []))
    other = tmp_path / "other"
    sizes = [
        (1, (), Kill("begin:10")),
        (2, (), Kill("end:21", (1,))),
        (1, ("--replicas=2",), Kill("begin:32")),
        (2, ("--replicas=2",), Kill("begin:44", (0, 1))),
        (1, ("--replicas=4",), None),
    ]
    runs = [
        (Run(other, workers, "same_on_all", (*flags, "--steps_per_call=1")), kill) for workers, flags, kill in sizes
    ]
    for run, kill in runs:
        _, found = next(carry_through(run, [kill] if kill else []))
        assert found.killed == (kill is not None), found.errors
    ours, theirs = state(other), state(reference.folder)
    assert ours["order"] == theirs["order"] != 0
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    ours, theirs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (other, reference.folder)
    ]
    assert [(line["step"], line["split"]) for line in ours] == [(line["step"], line["split"]) for line in theirs]
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5)


def test_the_order_that_the_task_keeps_is_that_of_its_examples(tmp_path):
    """So that an equal `order` says something: in NumPy, from the batches of the stream."""
    import tensorflow as tf

    from distloop.data import make_stream, per_replica_batches

    run = Run(tmp_path / "run", task="same_on_all", flags=("--train_steps=14",))
    assert faults.attempt(run, None).codes == [0]
    stream = make_stream(dying.DATA, name="train_data", global_batch_size=dying.BATCH, seed=0)
    batches = per_replica_batches(stream, tf.distribute.InputContext(), first_step=0).take(14).as_numpy_iterator()
    places, order = np.arange(dying.BATCH, dtype=np.int64), np.int64(0)
    with np.errstate(over="ignore"):
        for batch in batches:
            order = order * 31 + ((batch["id"] + 1) * (places * 2654435761 + 97))[batch["weight"] > 0].sum()
    assert state(run.folder)["order"] == order
