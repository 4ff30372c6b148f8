"""Launches with a planted truth: their speeds scatter by 1 %, and their windows, each like the one before, by 3 %."""

import numpy as np

from benchmarks import results
from benchmarks.cases import Case

CASE = Case("mnist_cnn")
ENV = {
    "hash": "e",
    "versions": {"tensorflow": "2.21.0", "distloop": "0.1.0"},
    "hardware": {"device": "a CPU", "devices": 1, "cpu": "a CPU", "cores": 2, "memory_bytes": 2**33},
    "environment": {},
}
FACTS = {
    "global_batch": CASE.global_batch,
    "params": 10,
    "gradient_bytes": {"dense": 40, "sparse": 0},
    "unit": "examples",
    "units_per_example": 1,
    "flops_per_example": None,
    "startup_s": {"import": 2.0, "first_step": 1.0},
    "memory": {"device_peak_bytes": None, "host_peak_bytes": 2**30},
    "losses": [],
    "warnings": [],
}


def step_ms(rng, launches, *, windows=40, mean=10.0, launch_cv=0.01, window_cv=0.03, correlation=0.5):
    """Return milliseconds a step of the windows of launches, whose windows are autoregressive of order 1."""
    noise = rng.normal(size=(windows, launches))
    for index in range(1, windows):
        noise[index] = correlation * noise[index - 1] + np.sqrt(1 - correlation**2) * noise[index]
    speeds = 1 + launch_cv * rng.normal(size=(launches, 1))
    return (mean * speeds * (1 + window_cv * noise.T)).tolist()


def launches_of(steps, name="launch", steps_per_window=10):
    """Return launches of one worker, one for each row of milliseconds a step."""
    return [
        results.Launch(
            f"{name}_{number}",
            FACTS,
            [
                {
                    "rank": 0,
                    "index": index,
                    "steps": steps_per_window,
                    "seconds": steps_per_window * ms / 1e3,
                    "input_wait_s": 0.0,
                    "host_gap_s": 0.0,
                }
                for index, ms in enumerate(row)
            ],
        )
        for number, row in enumerate(steps)
    ]


def write(recorder, case, steps, *, env=ENV, **more):
    """Write the lines of one case."""
    launches = launches_of(steps, case.key)
    for launch in launches:
        for window in launch.windows:
            recorder.write("window", launch=launch.id, **window)
    recorder.write("result", **results.summarize(case, launches, env=env["hash"], **more))
