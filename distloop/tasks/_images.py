"""What the image classifiers have in common: the images of ImageNet's training, or of any set, and a step."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distloop import Metric, Pipeline, RunConfig, State, Task, load_tfds, mean, minimize

Batch = dict[str, tf.Tensor]
_MADE_UP = 64  # different images, if there is no data_dir
_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's channels


def classifier(
    config: RunConfig,
    build: Callable[[], State],
    *,
    image_size: int,
    classes: int,
    examples: int,
    label_smoothing: float = 0.0,
) -> Task:
    """Return the task that trains `state.model` from images `[batch, image_size, image_size, 3]` to logits."""

    def train_step(state: State, batch: Batch) -> dict[str, Metric]:
        def loss(batch: Batch) -> tuple[Any, dict[str, Metric]]:
            images = (tf.cast(batch["image"], tf.float32) - _MEAN) / _DEVIATION
            logits = state.model(images, training=True)
            losses = keras.losses.categorical_crossentropy(
                tf.one_hot(batch["label"], classes), logits, from_logits=True, label_smoothing=label_smoothing
            )
            correct = keras.metrics.sparse_categorical_accuracy(batch["label"], logits)
            return losses, {"accuracy": mean(correct, batch["weight"])}

        return minimize(loss, batch, state.optimizer, state.model.trainable_variables)

    def train_data() -> Pipeline:
        if config.data_dir is None:
            return _made_up(config.seed, image_size, classes, examples)
        # What TFDS decodes has any size; the augmentation gives it the one of the model.
        images = load_tfds(config.dataset, "train", config.data_dir)
        return Pipeline(images, augment=lambda example, seed: _crop(example, seed, image_size))

    return Task(build, train_step, train_data)


def _made_up(seed: int, size: int, classes: int, examples: int) -> Pipeline:
    draw = np.random.default_rng(seed)
    images = draw.integers(256, size=[_MADE_UP, size, size, 3], dtype=np.uint8)
    labels = draw.integers(classes, size=examples, dtype=np.int32)

    def take(batch: Batch) -> Batch:
        return {"image": tf.gather(images, batch["image"]), "label": batch["label"]}

    return Pipeline({"image": np.arange(examples) % _MADE_UP, "label": labels}, map_batch=take)


def _crop(example: Batch, seed: tf.Tensor, size: int) -> Batch:
    """Cut out a part of random place, size and aspect ratio, perhaps mirrored (https://arxiv.org/abs/1409.4842)."""
    image = example["image"]
    if image.shape[-1] == 1:
        image = tf.image.grayscale_to_rgb(image)
    begin, shape, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    cut = tf.image.resize(tf.slice(image, begin, shape), [size, size])
    cut = tf.image.stateless_random_flip_left_right(cut, seed)
    cut.set_shape([size, size, 3])
    return {"image": tf.saturate_cast(cut, tf.uint8), "label": example["label"]}
