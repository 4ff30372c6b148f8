"""Restarts: none that is pointless, as many as make progress."""

import itertools

import pytest

from distloop.launcher.policy import End, Ending, Restart, decide

KILLED = Ending(137, begin=10, step=15)
RAISED = Ending(1, error="ValueError: no", begin=10, step=15)


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ([Ending(0)], ""),
        ([Ending(143, begin=0, step=7)], ""),
        ([Ending(137, begin=0, step=7, asked=True)], ""),
        ([Ending(64, error="UsageError: x")], "the same command would be refused again"),
        ([Ending(65, error="NotFiniteError: x", begin=0, step=7)], "the same command would diverge again"),
        ([Ending(69, error="PreflightError: x")], "the machines cannot train together"),
        ([Ending(1, error="ValueError: x", begin=0, step=0)], "before the first step"),
        ([Ending(1, error="ValueError: x")], "before the first step"),
        ([RAISED, RAISED], "the same error came at the same step twice"),
        ([KILLED, KILLED, KILLED, KILLED], "4 attempts in a row ended without a new checkpoint"),
    ],
)
def test_there_is_no_restart_where_it_would_be_pointless(history, why):
    decision = decide(history, max_restarts=3)
    assert isinstance(decision, End)
    assert why in decision.why
    assert bool(why) == bool(decision.why)


@pytest.mark.parametrize(
    "history",
    [
        [KILLED],
        [RAISED],
        [Ending(137)],  # killed while it was starting
        [Ending(124, begin=0, step=0)],  # hung before its first step
        [KILLED, RAISED],
        [RAISED, Ending(1, error="ValueError: no", begin=10, step=16)],  # the same error at another step
        [RAISED, Ending(1, error="OSError: no", begin=10, step=15)],  # another error at the same step
        [KILLED, Ending(1, error="ValueError: no", begin=10, step=10)],  # there was a first step, in an earlier attempt
        [Ending(69, error="PortTakenError: x", retry=True)],
        [KILLED, KILLED, KILLED],
    ],
)
def test_there_is_a_restart_where_it_may_help(history):
    assert isinstance(decide(history, max_restarts=3), Restart)


def test_a_crash_loop_ends_after_growing_delays():
    history, delays = [], []
    while True:
        history.append(Ending(137, begin=0, step=1))
        decision = decide(history, max_restarts=9)
        if isinstance(decision, End):
            break
        delays.append(decision.delay)
    expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(delays) == len(expected)
    for delay, middle in zip(delays, expected, strict=True):
        assert 0.75 * middle <= delay <= 1.25 * middle


def test_delays_differ_by_chance_so_that_many_runs_do_not_return_at_once():
    assert len({decide([KILLED], max_restarts=3).delay for _ in range(10)}) > 1


def test_progress_fills_the_budget_again():
    begins = itertools.chain.from_iterable((step, step, step) for step in range(0, 300, 10))
    history = []
    for begin in begins:
        history.append(Ending(137, begin=begin, step=begin + 3))
        decision = decide(history, max_restarts=3)
        assert isinstance(decision, Restart)
        assert decision.delay <= 1.25 * 4


def test_attempts_that_did_not_come_so_far_as_to_begin_count_as_no_progress():
    assert isinstance(decide([KILLED, Ending(137), Ending(137), KILLED], max_restarts=3), End)
