"""`python -m distloop` trains, like `python -m launch.train`."""

from distloop.flags import train_main

train_main()
