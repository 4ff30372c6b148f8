"""Run a command in worker processes on this host, and look after them: logs, restarts, hangs, a clean end.

python -m launch.run --workers=2 -- python -m launch.train --task=mnist_cnn --workdir=runs/two

`--help` lists the flags; `distloop-run` is the same command once distloop is installed.
"""

from distloop.launcher_flags import run_main

if __name__ == "__main__":
    run_main()
