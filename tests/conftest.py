"""Two logical CPUs, set before TensorFlow starts its devices, and the strategies over them, each made once."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

from distloop.cluster import Cluster
from distloop.strategies import make_strategy

pytest_plugins = ["tests.leftovers"]

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def mirrored():
    return make_strategy("mirrored", cluster=Cluster(), replicas=2)


@pytest.fixture(params=["default", "mirrored"])
def strategy(request, mirrored):
    return mirrored if request.param == "mirrored" else tf.distribute.get_strategy()
