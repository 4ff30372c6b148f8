"""Where examples come from: prepared or downloadable TensorFlow Datasets, and the MNIST sample in the package."""

import os
from pathlib import Path
from typing import Any

from distloop.errors import UsageError
from distloop.pipeline import Pipeline
from distloop.records import records_of

SAMPLE_DIR = Path(__file__).parent / "sample_data"  # mnist: 10,000 train and 2,000 test images


def load_tfds(dataset: str, split: str, data_dir: str | None) -> Pipeline:
    """Return the single examples of a TFDS data set as dicts, in the stored order.

        Pipeline(load_tfds("mnist", "train[:10%]", None), map=normalize)

    Files in the tfrecord format are read by index, others in turn.
    `data_dir` None is the package's sample for mnist, else TFDS's own default folder. What is not prepared is
    downloaded into the default folder or into an empty `data_dir`. Raises UsageError if the folder, the data set or the
    split is not there.
    """
    import tensorflow_datasets as tfds  # here, because it costs half a second that only users of TFDS should pay

    if data_dir is None and dataset == "mnist":
        data_dir = str(SAMPLE_DIR)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(
            f"data_dir {data_dir} is not a folder; expected one that holds prepared TFDS data sets "
            f"({data_dir}/{dataset}/VERSION/...), or an empty one to download into."
        )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
    except Exception as error:  # of many types: unknown name, configuration, version, malformed name
        raise UsageError(
            f"TFDS has no data set {dataset!r}, and {data_dir or 'its default folder'} holds none of that name "
            f"({type(error).__name__}); check --dataset and --data_dir."
        ) from error
    if not builder.is_prepared():
        if data_dir is not None and any(Path(data_dir).iterdir()):
            raise UsageError(
                f"data_dir {data_dir} does not hold data set {dataset!r} ({data_dir}/{builder.info.full_name}/...); "
                f"prepare it there with tfds build {dataset} --data_dir={data_dir}, or give an empty folder."
            )
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise UsageError(
                f"data set {dataset!r} is not prepared in {data_dir or 'the default folder of TFDS'} and could not be "
                f"downloaded ({type(error).__name__}); give --data_dir a folder that holds it."
            ) from error
    try:
        instructions = builder.info.splits[split].file_instructions
    except Exception as error:  # of several types: an unknown split, a malformed one, one beyond the end
        raise UsageError(
            f"data set {dataset!r} has no split {split!r}; it has {', '.join(builder.info.splits)}."
        ) from error
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        # One file after the other: the order of the examples is that of the files.
        read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        return Pipeline(builder.as_dataset(split=split, read_config=read_config))  # pyright: ignore[reportCallIssue] (a decorator hides the parameters)
    parts = [(os.fspath(part.filename), part.skip, part.take if part.take >= 0 else None) for part in instructions]
    features: Any = builder.info.features
    return Pipeline(records_of(parts), map=features.deserialize_example)
