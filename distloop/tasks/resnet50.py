"""ResNet-50 (https://arxiv.org/abs/1512.03385), version 1.5: a block that halves the image does so in its 3x3.

    python -m launch.train --task=resnet50 --dataset=imagenet2012 --data_dir=DIR --workdir=runs/resnet50

SGD as in https://arxiv.org/abs/1706.02677, without its schedule. Without --data_dir, images are made up.
"""

from typing import Any

import keras
from keras import layers

from distloop import RunConfig, State, Task
from distloop.tasks._images import classifier


def make_task(
    config: RunConfig,
    *,
    blocks: str = "3-4-6-3",
    width: int = 64,
    image_size: int = 224,
    classes: int = 1000,
    examples: int = 16384,
) -> Task:
    """Classify images of `config.dataset`; each of the four stages has so many `blocks`, the first is `width` wide."""

    def build() -> State:
        image = keras.Input([image_size, image_size, 3])
        x = _normed(_convolution(width, 7, 2)(image))
        x = layers.MaxPooling2D(3, 2, padding="same")(layers.ReLU()(x))
        for stage, number in enumerate(map(int, blocks.split("-"))):
            for index in range(number):
                x = _bottleneck(x, width * 2**stage, stride=2 if stage and not index else 1)
        logits = layers.Dense(classes, dtype="float32")(layers.GlobalAveragePooling2D()(x))
        optimizer = keras.optimizers.SGD(config.learning_rate, momentum=0.9, weight_decay=1e-4)
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        return State(model=keras.Model(image, logits), optimizer=optimizer)

    return classifier(config, build, image_size=image_size, classes=classes, examples=examples, label_smoothing=0.1)


def _bottleneck(x: Any, width: int, *, stride: int) -> Any:
    shortcut = x
    if stride > 1 or x.shape[-1] != 4 * width:
        shortcut = _normed(_convolution(4 * width, 1, stride)(x))
    x = layers.ReLU()(_normed(_convolution(width, 1)(x)))
    x = layers.ReLU()(_normed(_convolution(width, 3, stride)(x)))
    # A block begins as the identity.
    x = _normed(_convolution(4 * width, 1)(x), gamma_initializer="zeros")
    return layers.ReLU()(x + shortcut)


def _convolution(filters: int, size: int, stride: int = 1) -> layers.Conv2D:
    return layers.Conv2D(filters, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal")


def _normed(x: Any, **settings: Any) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, **settings)(x)
