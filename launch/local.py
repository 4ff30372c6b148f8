"""Train in several processes on this machine.

python -m launch.local --workers=2 -- --task=mnist_cnn --workdir=runs/two --epochs=5

What follows `--` are flags of launch.train; `distloop-local` is the same command once distloop is installed.
"""

from distloop.flags import local_main

if __name__ == "__main__":
    local_main()
