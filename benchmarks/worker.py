"""One launch of one case, in processes of its own: set up as a training is, warm up, measure, write a file a worker.

    python -m benchmarks.worker '{"case": {...}, "timing": {...}, "folder": "..."}'

`benchmarks.run` starts it, through the launcher if a case has several workers.
"""

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import psutil

from benchmarks import peers, timing
from benchmarks.cases import Case, from_dict
from distloop import cluster, workdir
from distloop.config import RunConfig
from distloop.errors import UsageError
from distloop.say import say
from distloop.storage import as_path


def main(request: str) -> int:
    """Measure what `request` asks for; leave `rank_<k>.json` in its folder. Return the exit code."""
    asked = json.loads(request)
    case, folder = from_dict(asked["case"]), Path(asked["folder"])
    workers = cluster.from_tf_config(os.environ.get("TF_CONFIG"))
    before = time.time() - psutil.Process().create_time()
    began = time.perf_counter()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from benchmarks import end_to_end, measuring  # which load TensorFlow

    startup = {"python": before, "import": time.perf_counter() - began}
    try:
        config = config_of(case, folder)
        if case.mode == "e2e":
            found = end_to_end.measure(case, config, startup)
        else:
            found = measuring.measure(case, timing.Timing(**asked["timing"]), config, workers, startup)
    except UsageError as error:
        say(str(error))
        return error.exit_code
    except Exception as error:
        if case.peer == "distloop":
            raise
        traceback.print_exc()
        say(peers.reason(error))
        return 1
    found["facts"]["memory"]["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workdir.write_json(as_path(folder) / f"rank_{workers.index}.json", found)
    return 0


def config_of(case: Case, folder: Path) -> RunConfig:
    """Return the settings of the run that is measured. Raises UsageError, as for any run."""
    return RunConfig(
        task=case.workload,
        workdir=str(folder / "run"),
        strategy="auto" if case.total_replicas > 1 else "default",
        replicas=case.replicas,
        global_batch_size=case.global_batch,
        **case.settings,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
