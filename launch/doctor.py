"""Say what this machine, and the cluster it is part of, look like to distloop, and what to mend.

python -m launch.doctor
python -m launch.doctor --hosts=a,b --workdir=runs/two

It ends with 0 if nothing is wrong, else with 69. `distloop-doctor` is the same command once distloop is installed.
"""

from distloop.launcher_flags import doctor_main

if __name__ == "__main__":
    doctor_main()
