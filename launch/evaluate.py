"""Evaluate a checkpoint of a run, or with --follow each one as it appears.

python -m launch.evaluate --workdir=runs/mnist_cnn

Settings are those of the run; `--help` lists what can be given in their place. `distloop-evaluate` is the same command
once distloop is installed.
"""

from distloop.flags import evaluate_main

if __name__ == "__main__":
    evaluate_main()
