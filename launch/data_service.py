"""Serve batches to training processes: a tf.data service, its dispatcher and its workers, on this machine.

python -m launch.data_service --workers=4

It prints the address to give to --data_service of launch.train; `--dispatcher=ADDRESS` adds workers from another
machine. `distloop-data-service` is the same command once distloop is installed.
"""

from distloop.flags import data_service_main

if __name__ == "__main__":
    data_service_main()
