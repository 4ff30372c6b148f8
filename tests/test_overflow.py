"""Promise P2: an overflow on any one replica or worker skips the update on all, and changes nothing else."""

import numpy as np
import pytest

from tests import in_workers
from tests.overflow import BAD_STEP, STEPS, run

CRITIC_PARTS = 7  # loss, its count, norm, its count, scale, its count, skipped steps
# What an overflow in the second optimizer of a GAN may change: what the first has done before.
FIRST_OF_GAN = ("critic/", "first/", "average/first/", "loss_scale/first/")


def check(snapshots, reference, case):
    """Assert on one worker's snapshots: the step skipped, the scale halved once, and then the run without it."""
    owner = "second" if case == "gan" else "optimizer"
    before, after = snapshots[BAD_STEP - 1], snapshots[BAD_STEP]
    replicas = {name.partition(":")[0] for name in after if ":" in name}
    compared = 0
    for key in after:
        replica, _, name = key.partition(":")
        if not name or name == "step" or name.startswith((f"loss_scale/{owner}/", *(FIRST_OF_GAN * (case == "gan")))):
            continue
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
        compared += 1
    assert compared >= 15 * len(replicas)  # weights, slots, iterations, statistics, seeds, averages
    for replica in replicas:
        assert float(after[f"{replica}:loss_scale/{owner}/scale"]) == 512.0
        assert float(snapshots[-1][f"{replica}:loss_scale/{owner}/scale"]) == 512.0
        assert int(snapshots[-1][f"{replica}:loss_scale/{owner}/skipped"]) == 1
        if case == "gan":
            assert float(after[f"{replica}:loss_scale/first/scale"]) == 1024.0
    for step in range(STEPS):
        for key, value in snapshots[step].items():
            name = key.partition(":")[2]
            if not name or name == "step" or name.startswith(f"loss_scale/{owner}/"):
                continue
            # A power of two as the scale changes no bit but where 16 bits underflow.
            np.testing.assert_allclose(value, reference[step][key], rtol=1e-4, atol=1e-6, err_msg=f"{step} {key}")
    first_part = {"plain": 0, "gan": CRITIC_PARTS}[case]
    for step in range(STEPS):
        if step != BAD_STEP:
            ours, expected = (np.delete(held[step]["sums"], first_part + 4) for held in (snapshots, reference))
            np.testing.assert_allclose(ours, expected, rtol=1e-4)  # all but the scale
    # The skipped step counts in no metric but these: scale (as it was) and 1; one skipped step.
    np.testing.assert_array_equal(after["sums"][first_part:], [0, 0, 0, 0, 1024, 1, 1])
    moved = [key for key in after if "/iteration" in key and f":{owner}/" in key]
    assert moved
    assert all(snapshots[-1][key] == STEPS - 1 for key in moved)


@pytest.fixture(scope="module", params=["plain", "gan"])
def case_and_reference(request, mirrored):
    return request.param, run(mirrored, request.param, None)


@pytest.mark.parametrize("bad_replica", [0, 1])
def test_an_overflow_on_one_replica_skips_the_update_on_all(mirrored, case_and_reference, bad_replica):
    case, reference = case_and_reference
    check(run(mirrored, case, bad_replica), reference, case)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Run all cases in two processes; a hang would be for ever, the limit is for two starts and six compilations."""
    held = in_workers.run("tests.overflow:in_workers", tmp_path_factory.mktemp("workers") / "out", limit_secs=120)
    runs = [{} for _ in held]
    for arrays, ours in zip(held, runs, strict=True):
        for key, value in arrays.items():
            case, bad, step, name = key.split("|")
            ours.setdefault((case, bad), [{} for _ in range(STEPS)])[int(step)][name] = value
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "gan"])
@pytest.mark.parametrize("bad_worker", ["0", "1"])
def test_an_overflow_on_one_worker_skips_the_update_on_all_and_nobody_waits(workers, case, bad_worker):
    for runs in workers:
        check(runs[case, bad_worker], runs[case, "None"], case)
    for one, other in zip(*(runs[case, bad_worker] for runs in workers), strict=True):
        for key, value in one.items():
            if not key.endswith("seed_generator_state"):
                np.testing.assert_array_equal(value, other[key], err_msg=key)
