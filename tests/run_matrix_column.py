"""Train rows of the matrix in one column: python -m tests.run_matrix_column FOLDER COLUMN_JSON [ROW...].

Writes FOLDER/<row number>.worker<index>.npz: every variable on every local replica, and the logged values of each step.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

from distloop import train
from distloop.cluster import from_tf_config
from distloop.task import named_variables
from tests.dump_replicas import on_local_replicas
from tests.matrix_rows import ROWS, run_config


def main() -> None:
    folder, column, rows = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:] or list(ROWS)
    worker = from_tf_config(os.environ.get("TF_CONFIG")).index
    for name in rows:
        number = list(ROWS).index(name)
        task, logged = ROWS[name].make_task(), []
        states, start = [], {}

        def build(task=task, states=states, start=start):
            states.append(task.build())
            start.update({f"start:{n}": v.numpy() for n, v in named_variables(states[0]).items() if "kernel" in n})
            return states[0]

        watched = dataclasses.replace(task, build=build)
        config = run_config(name, column, str(folder / f"workdir{number}"))
        train(watched, config, extra_actions=[lambda progress, logged=logged: logged.append(progress.metrics)])
        arrays = {**start, **{f"metric:{key}": np.array([line[key] for line in logged]) for key in logged[0]}}
        for variable_name, variable in named_variables(states[0]).items():
            for replica, value in enumerate(on_local_replicas(variable)):
                arrays[f"{replica}:{variable_name}"] = value
        np.savez(folder / f"{number}.worker{worker}.npz", **arrays)


if __name__ == "__main__":
    main()
