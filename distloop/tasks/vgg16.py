"""VGG-16 (https://arxiv.org/abs/1409.1556): 138 M weights, most in one dense layer: large gradients.

    python -m launch.train --task=vgg16 --dataset=imagenet2012 --data_dir=DIR --learning_rate=0.01 --workdir=runs/vgg16

Without --data_dir, images are made up.
"""

import keras
from keras import layers

from distloop import RunConfig, State, Task
from distloop.tasks._images import classifier


def make_task(
    config: RunConfig,
    *,
    width: int = 64,
    dense: int = 4096,
    image_size: int = 224,
    classes: int = 1000,
    dropout: float = 0.5,
    examples: int = 16384,
) -> Task:
    """Classify images of `config.dataset` by convolutions of `width` to 8 `width`, and two layers of `dense` units."""

    def build() -> State:
        image = x = keras.Input([image_size, image_size, 3])
        for number, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
            for _ in range(number):
                x = layers.Conv2D(factor * width, 3, padding="same", activation="relu", kernel_initializer="he_normal")(
                    x
                )
            x = layers.MaxPooling2D(2)(x)
        x = layers.Flatten()(x)
        for _ in range(2):
            x = layers.Dropout(dropout)(layers.Dense(dense, activation="relu", kernel_initializer="he_normal")(x))
        logits = layers.Dense(classes, dtype="float32")(x)
        optimizer = keras.optimizers.SGD(config.learning_rate, momentum=0.9, weight_decay=5e-4)
        return State(model=keras.Model(image, logits), optimizer=optimizer)

    return classifier(config, build, image_size=image_size, classes=classes, examples=examples)
