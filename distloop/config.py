"""The settings of one run, checked when they are made. Imports no TensorFlow.

config = RunConfig(workdir="runs/mnist", task="mnist_cnn", epochs=5)
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from distloop.errors import UsageError, check_address
from distloop.tasks import parse_arguments

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
WIRE_DTYPES = ("float32", "bfloat16", "float16")
STRATEGIES = ("auto", "default", "one_device", "mirrored", "multiworker", "tpu")
DEFAULT_EPOCHS = 5


def _setting(default: Any, help_text: str, *, shapes_result: bool = True) -> Any:
    """Make a field. `shapes_result`: two runs that differ in it are different runs (not resumable into each other)."""
    return field(default=default, metadata={"help": help_text, "shapes_result": shapes_result})


@dataclass(frozen=True)
class RunConfig:
    """Hold every setting of a run; `None` means what the help text says. Raises UsageError on values that cannot work.

    Hyper-parameters of a model are arguments of its task, in `task_args`: `make_task(config, layers=2)`.
    """

    task: str | None = _setting(
        None, "a task of the library, such as mnist_cnn, or your own: my_package.my_module:make_task"
    )
    task_args: str | None = _setting(
        None,
        "arguments of the task by name, such as layers=2,width=64; a value is a Python literal or a word, no comma",
    )
    workdir: str | None = _setting(
        None, "folder of this run: checkpoints, metrics and event files go there", shapes_result=False
    )
    strategy: str = _setting(
        "auto",
        f"{', '.join(STRATEGIES)}; auto picks multiworker with a TF_CONFIG of several workers, tpu on a TPU VM, "
        "mirrored with several replicas, else default",
        shapes_result=False,
    )
    replicas: int | None = _setting(
        None,
        "replicas in this process: how many GPUs to use, or logical CPU devices where there is no GPU "
        "(default: all GPUs, or 1)",
        shapes_result=False,
    )
    dataset: str = _setting("mnist", "name of a TensorFlow Datasets data set, for the tasks that read one")
    data_dir: str | None = _setting(
        None, "folder of prepared TFDS data sets (default for mnist: the sample that the package carries)"
    )
    data_service: str | None = _setting(
        None,
        "address (host:port) of a tf.data service that makes the training batches, as launch.data_service prints it",
        shapes_result=False,
    )
    global_batch_size: int = _setting(64, "examples a step over all replicas and workers")
    epochs: int | None = _setting(
        None, f"length of the training in epochs (default: {DEFAULT_EPOCHS}); give this or --train_steps"
    )
    train_steps: int | None = _setting(None, "length of the training in steps; give this or --epochs")
    steps_per_call: int = _setting(
        50, "most steps to run in one compiled call; progress and metrics are written once a call", shapes_result=False
    )
    eval_every_steps: int | None = _setting(
        None,
        "evaluate every so many steps (default: after each epoch); the end is always evaluated",
        shapes_result=False,
    )
    checkpoint_every_steps: int | None = _setting(
        None, "save every so many steps (default: after each epoch); the end is always saved", shapes_result=False
    )
    keep_checkpoints: int = _setting(3, "how many of the newest checkpoints to keep, at least 2", shapes_result=False)
    best_metric: str | None = _setting(
        None,
        "keep the checkpoint with the best value of this metric of the evaluations, such as accuracy",
        shapes_result=False,
    )
    best_mode: str = _setting("max", "max or min: which value of --best_metric is best", shapes_result=False)
    init_from: str | None = _setting(
        None, "start from the weights of another run: its workdir, or the folder of one checkpoint"
    )
    seed: int = _setting(0, "seed of the initial weights and of the order of the examples")
    learning_rate: float = _setting(1e-3, "learning rate, for the tasks that use one")
    precision: str = _setting(
        "float32", f"{', '.join(PRECISIONS)}: the Keras dtype policy; mixed_float16 comes with a loss scale"
    )
    loss_scale: float | None = _setting(None, "static loss scale for mixed_float16 (default: a dynamic one)")
    initial_loss_scale: float = _setting(2.0**15, "dynamic loss scale: where it starts")
    loss_scale_growth_steps: int = _setting(2000, "dynamic loss scale: grow after so many steps without overflow")
    loss_scale_growth_factor: float = _setting(2.0, "dynamic loss scale: grow by this factor")
    loss_scale_backoff_factor: float = _setting(0.5, "dynamic loss scale: multiply by this after an overflow")
    min_loss_scale: float = _setting(1.0, "dynamic loss scale: never below this")
    clip_global_norm: float | None = _setting(
        None, "clip the reduced gradients of an optimizer to this norm, all variables together"
    )
    clip_norm: float | None = _setting(None, "clip the reduced gradient of each variable to this norm")
    clip_value: float | None = _setting(None, "clip each entry of the reduced gradients to this absolute value")
    gradient_norm: bool = _setting(False, "log the global norm of the reduced gradients, from before any clipping")
    micro_batches: int = _setting(
        1, "accumulate gradients: each replica splits its part of the global batch in so many, one update for all"
    )
    ema_momentum: float | None = _setting(
        None, "keep a moving average of the weights with this momentum, such as 0.999, and evaluate with it"
    )
    shard_optimizer: bool = _setting(
        False,
        "each replica keeps and updates its part of the optimizer's slots only (ZeRO-1), all gather the new weights",
        shapes_result=False,
    )
    bytes_per_pack: int | None = _setting(
        None,
        "bytes of gradients to send at a time, while the backward pass goes on; 0 for all at once "
        "(default: by the model's size)",
        shapes_result=False,
    )
    wire_dtype: str = _setting(
        "float32", f"{', '.join(WIRE_DTYPES)}: in which gradients travel from replica to replica; all else is float32"
    )
    jit_compile: bool | str = _setting(
        False,
        "compile forward and backward with XLA; reductions and updates stay outside; auto measures at the start if it "
        "pays",
    )
    deterministic: bool = _setting(
        False,
        "same bits in every run on the same hardware: deterministic operations and a fixed order of sums, "
        "at some cost in speed on GPUs",
    )

    def __post_init__(self) -> None:
        parse_arguments(self.task_args)
        if self.strategy not in STRATEGIES:
            raise UsageError(f"strategy is {self.strategy!r}; expected one of {', '.join(STRATEGIES)}.")
        if self.epochs is not None and self.train_steps is not None:
            raise UsageError(
                f"epochs ({self.epochs}) and train_steps ({self.train_steps}) are both given; "
                "the length of a run is one of them: drop the other."
            )
        for name in (
            "replicas",
            "global_batch_size",
            "epochs",
            "train_steps",
            "steps_per_call",
            "eval_every_steps",
            "checkpoint_every_steps",
            "micro_batches",
            "loss_scale_growth_steps",
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise UsageError(f"{name} is {value}; expected a whole number of at least 1.")
        if not (isinstance(self.keep_checkpoints, int) and self.keep_checkpoints >= 2):
            raise UsageError(
                f"keep_checkpoints is {self.keep_checkpoints}; expected at least 2, so that a damaged one loses little."
            )
        if self.bytes_per_pack is not None and not (isinstance(self.bytes_per_pack, int) and self.bytes_per_pack >= 0):
            raise UsageError(
                f"bytes_per_pack is {self.bytes_per_pack}; expected a whole number of bytes, such as 4000000, or 0 for "
                "one pack."
            )
        if self.wire_dtype not in WIRE_DTYPES:
            raise UsageError(f"wire_dtype is {self.wire_dtype!r}; expected one of {', '.join(WIRE_DTYPES)}.")
        if self.jit_compile not in (False, True, "auto"):
            raise UsageError(f"jit_compile is {self.jit_compile!r}; expected True, False or auto.")
        if self.best_mode not in ("max", "min"):
            raise UsageError(f"best_mode is {self.best_mode!r}; expected max or min.")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed is {self.seed}; expected a whole number from 0 to {2**31 - 1}.")
        for name in (
            "learning_rate",
            "loss_scale",
            "initial_loss_scale",
            "clip_global_norm",
            "clip_norm",
            "clip_value",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} is {value}; expected a number above 0, such as 0.001.")
        self._check_precision()
        if self.ema_momentum is not None and not 0 <= self.ema_momentum < 1:
            raise UsageError(
                f"ema_momentum is {self.ema_momentum}; expected a number from 0 to below 1, such as 0.999."
            )

        if self.data_service is not None:
            check_address(self.data_service, "data_service")

    def _check_precision(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}.")
        if self.loss_scale is not None and self.precision != "mixed_float16":
            raise UsageError(
                f"loss_scale is {self.loss_scale}, but precision is {self.precision}, whose gradients need none; "
                "drop it or use --precision=mixed_float16."
            )
        if not (self.loss_scale_growth_factor > 1 and 0 < self.loss_scale_backoff_factor < 1):
            raise UsageError(
                f"the loss scale grows by {self.loss_scale_growth_factor} and shrinks by "
                f"{self.loss_scale_backoff_factor}; expected a growth factor above 1 and a backoff factor from 0 to 1."
            )
        if not 0 < self.min_loss_scale <= self.initial_loss_scale:
            raise UsageError(
                f"min_loss_scale is {self.min_loss_scale} and initial_loss_scale {self.initial_loss_scale}; "
                "expected a minimum above 0 and at most the initial one."
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the run in steps."""
        return self.train_steps or (self.epochs or DEFAULT_EPOCHS) * steps_per_epoch  # neither is ever 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, `workdir` left out so that a run's folder can be moved."""
        values = {name: value for name, value in asdict(self).items() if name != "workdir"}
        return values if self.train_steps else {**values, "epochs": self.epochs or DEFAULT_EPOCHS}


def shaping_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that make a run what it is, as JSON values."""
    values = config.to_dict()
    return {setting.name: values[setting.name] for setting in fields(config) if setting.metadata["shapes_result"]}


def shaping_differences(config: RunConfig, other: dict[str, Any]) -> list[str]:
    """Return `name: theirs, not ours` for each setting that makes `other` (a saved config) another run."""
    defaults = {setting.name: setting.default for setting in fields(config)}
    return [
        f"{name}={other.get(name, defaults[name])!r} there, {value!r} here"
        for name, value in shaping_settings(config).items()
        if other.get(name, defaults[name]) != value
    ]
