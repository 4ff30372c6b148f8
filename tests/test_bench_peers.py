"""The peers train what distloop trains: the same weights after the same steps, or they say why not."""

import functools
import sys

import numpy as np
import pytest

from benchmarks import peers
from distloop.errors import UsageError
from tests.harness import run_workers
from tests.peer_tasks import TOKENS, classifier, regression_of_tokens, train

PLACES = {"one device": {"strategy": "default"}, "two replicas": {"strategy": "mirrored", "replicas": 2}}
OTHERS = ("loop", "loop_in_graph", "fit", "fit_many", "orbit")
CALLS = (6, 6)  # of two compiled calls each


def trained(peer, task, calls, **settings):
    if peer == "orbit":
        try:
            peers.check_installed(peer)
        except UsageError as error:
            pytest.skip(str(error))
    return train(peer, task, calls, **settings)


@functools.cache
def reference(task, calls, **settings):
    return train("distloop", task, calls, **settings)


def assert_equal(found, expected, tolerance=1e-5):
    (losses, weights), (expected_losses, expected_weights) = found, expected
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("peer", OTHERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_peer_trains_the_same_weights(peer, place):
    if (peer, place) == ("fit_many", "two replicas"):
        pytest.skip("Keras cannot: see the next test")
    found = trained(peer, classifier, CALLS, **PLACES[place])
    assert_equal(found, reference(classifier, CALLS, **PLACES[place]))


def test_many_steps_an_execution_of_fit_on_two_replicas_end_with_the_error_of_keras():
    # If this fails since Keras can, the skip above is to go, and a paragraph in docs/benchmarks/peers.md.
    with pytest.raises(Exception, match="You must feed a value for placeholder") as caught:
        train("fit_many", classifier, CALLS, **PLACES["two replicas"])
    assert peers.reason(caught.value) == "x"


@pytest.mark.parametrize("peer", ["loop", "fit"])
def test_a_loss_over_tokens_is_divided_by_those_of_all_replicas(peer):
    # One batch is all of the data, so that its order does not matter.
    losses, weights = trained(peer, regression_of_tokens, (1,) * 4, global_batch_size=32, **PLACES["two replicas"])
    _, start = train("distloop", regression_of_tokens, (), **PLACES["one device"])
    (kernel,) = start.values()
    x, y, share = TOKENS["x"], TOKENS["y"], TOKENS["tokens"] / TOKENS["tokens"].sum()
    for loss in losses:
        error = x @ kernel[:, 0] - y
        assert loss == pytest.approx((share * error**2).sum(), rel=1e-5)
        kernel = kernel - 0.1 * 2 * np.einsum("bt,btf->f", share * error, x)[:, None]
    np.testing.assert_allclose(*weights.values(), kernel, rtol=1e-5)
