"""Train in one process.

python -m launch.train --task=mnist_cnn --workdir=runs/mnist_cnn --epochs=5

`--help` lists the flags; `distloop-train` is the same command once distloop is installed.
"""

from distloop.flags import train_main

if __name__ == "__main__":
    train_main()
