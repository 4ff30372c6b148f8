"""What is counted of a workload: its unit of throughput."""

from collections.abc import Mapping
from typing import Any


def unit_of(task_name: str, features: Mapping[str, Any]) -> tuple[str, int]:
    """Return what throughput counts and how many of them an example has; `features` have shapes, of one example.

    Tokens are those that a model computes with, whether they are masked or predicted.
    """
    if task_name.startswith("gpt"):
        return "tokens", features["tokens"].shape[0] - 1  # the last one is only predicted
    if task_name.startswith("bert"):
        return "tokens", features["input_ids"].shape[0]
    return ("images" if "image" in features else "examples"), 1
