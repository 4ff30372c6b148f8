"""The vision transformer ViT-B/16 (https://arxiv.org/abs/2010.11929), in its training on ImageNet alone.

    python -m launch.train --task=vit_b16 --dataset=imagenet2012 --data_dir=DIR --clip_global_norm=1 --workdir=runs/vit

Without --data_dir, images are made up.
"""

import keras
import tensorflow as tf

from distloop import RunConfig, State, Task
from distloop.tasks._images import classifier
from distloop.tasks._transformer import Positions, block, dense, norm


class ClassToken(keras.layers.Layer):
    """Put a learned token before those of `[batch, length, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = self.add_weight(shape=[1, 1, width], initializer="zeros", name="token")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return `[batch, 1 + length, width]`."""
        return tf.concat([tf.repeat(tf.cast(self.token, x.dtype), tf.shape(x)[0], axis=0), x], axis=1)


def make_task(
    config: RunConfig,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    patch: int = 16,
    image_size: int = 224,
    classes: int = 1000,
    dropout: float = 0.1,
    examples: int = 16384,
) -> Task:
    """Classify images of `config.dataset` by their patches of `patch` x `patch` pixels with AdamW."""

    def build() -> State:
        image = keras.Input([image_size, image_size, 3])
        length = (image_size // patch) ** 2
        patches = keras.layers.Conv2D(width, patch, patch)(image)
        x = ClassToken(width)(keras.layers.Reshape([length, width])(patches))
        x = keras.layers.Dropout(dropout)(Positions(1 + length, width)(x))
        for _ in range(layers):
            x = block(x, heads, dropout=dropout, activation="gelu")
        logits = dense(classes, dtype="float32")(norm()(x)[:, 0])
        optimizer = keras.optimizers.AdamW(config.learning_rate, weight_decay=0.3)
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        return State(model=keras.Model(image, logits), optimizer=optimizer)

    return classifier(config, build, image_size=image_size, classes=classes, examples=examples)
