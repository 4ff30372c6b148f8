import math

import pytest

from distloop.config import RunConfig, shaping_differences
from distloop.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(epochs=0), "epochs is 0; expected a whole number of at least 1."),
        (dict(epochs=-3), "epochs is -3; expected a whole number of at least 1."),
        (dict(train_steps=0), "train_steps is 0; expected a whole number of at least 1."),
        (dict(steps_per_call=0), "steps_per_call is 0"),
        (dict(eval_every_steps=-1), "eval_every_steps is -1"),
        (dict(checkpoint_every_steps=0), "checkpoint_every_steps is 0"),
        (dict(global_batch_size=0), "global_batch_size is 0"),
        (dict(replicas=0), "replicas is 0"),
        (dict(epochs=1, train_steps=5), "epochs (1) and train_steps (5) are both given"),
        (dict(strategy="horovod"), "strategy is 'horovod'; expected one of auto, default, one_device, mirrored,"),
        (dict(epochs=1.5), "epochs is 1.5; expected a whole number"),
        (dict(train_steps="5"), "train_steps is 5; expected a whole number"),
        (dict(seed=-1), "seed is -1; expected a whole number from 0"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; expected a number above 0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (
            dict(task_args="layers"),
            "task_args has 'layers'; expected name=value,name=value, such as layers=2,width=64.",
        ),
        (dict(task_args="layers=2,"), "task_args has ''; expected"),
        (dict(task_args="shape=(2,3)"), "task_args has '3)'; expected"),
        (dict(task_args="a=1,a=2"), "task_args gives 'a' twice; give each argument once."),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_sentence(settings, sentence):
    with pytest.raises(UsageError) as refusal:
        RunConfig(**settings)
    assert sentence in str(refusal.value)


def test_durations_become_steps():
    assert RunConfig(epochs=3).total_steps(157) == 471
    assert RunConfig(train_steps=50).total_steps(157) == 50
    assert RunConfig().total_steps(10) == 50


def test_only_settings_that_shape_the_result_make_another_run():
    saved = RunConfig(seed=1, strategy="mirrored", replicas=4, workdir="here").to_dict()
    assert shaping_differences(RunConfig(seed=1, workdir="there", steps_per_call=7), saved) == []
    assert shaping_differences(RunConfig(seed=2), saved) == ["seed=1 there, 2 here"]
    assert shaping_differences(RunConfig(seed=1, task_args="layers=2"), saved) == [
        "task_args=None there, 'layers=2' here"
    ]


def test_a_default_that_is_written_out_is_the_same_run():
    assert shaping_differences(RunConfig(), RunConfig(epochs=5).to_dict()) == []
    assert shaping_differences(RunConfig(), {"dataset": "mnist", "epochs": 5}) == []  # saved before a field was added
    assert shaping_differences(RunConfig(train_steps=5), RunConfig(train_steps=5).to_dict()) == []
    assert shaping_differences(RunConfig(), RunConfig(train_steps=5).to_dict()) != []
