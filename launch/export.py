"""Write the model of a run as a SavedModel or a `.keras` file.

python -m launch.export --workdir=runs/mnist_cnn --output=exported/mnist_cnn

`--help` lists the flags; `distloop-export` is the same command once distloop is installed.
"""

from distloop.flags import export_main

if __name__ == "__main__":
    export_main()
