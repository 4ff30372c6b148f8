"""Measure distloop: throughput, scaling, where a step's time goes, and what larger machines would do.

The same `train_steps` as in training is measured, on the tasks of the library; no number is printed without its record.
"""
