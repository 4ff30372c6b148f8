import pytest

from distloop import RunConfig, in_memory, load_tfds
from distloop.datasets import SAMPLE_DIR
from distloop.errors import UsageError


def test_the_sample_in_the_package_is_small_real_and_balanced():
    train, test = (in_memory(load_tfds("mnist", split, None)) for split in ("train", "test"))
    assert train["image"].shape == (10_000, 28, 28, 1)
    assert test["image"].shape == (2_000, 28, 28, 1)
    for split in (train, test):
        assert str(split["image"].dtype) == "uint8"
        assert 0.1 < split["image"].mean() / 255 < 0.16
        assert min((split["label"] == digit).mean() for digit in range(10)) > 0.08
    assert sum(path.stat().st_size for path in SAMPLE_DIR.rglob("*") if path.is_file()) < 4e6
    assert "CC BY-SA 3.0" in (SAMPLE_DIR / "README.md").read_text()


def test_the_stored_order_is_the_same_each_time():
    first, second = (in_memory(load_tfds("mnist", "test", None))["label"] for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(
    ("dataset", "split", "data_dir", "sentence"),
    [
        ("mnist", "train", "/no/such/folder", "data_dir /no/such/folder is not a folder; expected one that holds"),
        ("mnist", "validation", None, "data set 'mnist' has no split 'validation'; it has train, test."),
        ("mnits", "train", str(SAMPLE_DIR), "TFDS has no data set 'mnits'"),
        ("mnist:9.9.9", "train", str(SAMPLE_DIR), "TFDS has no data set 'mnist:9.9.9'"),
        ("No-Such!", "train", str(SAMPLE_DIR), "TFDS has no data set 'No-Such!'"),
        ("fashion_mnist", "train", str(SAMPLE_DIR), "does not hold data set 'fashion_mnist'"),
        ("mnist", "train", str(SAMPLE_DIR / "mnist"), "does not hold data set 'mnist'"),
    ],
)
def test_data_that_is_not_there_is_refused(dataset, split, data_dir, sentence):
    with pytest.raises(UsageError) as refusal:
        load_tfds(dataset, split, data_dir)
    assert sentence in str(refusal.value)


def test_a_data_set_that_is_neither_prepared_nor_downloadable_is_refused(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    # A machine without a network, whatever this one has.
    def no_network(self, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    with pytest.raises(UsageError, match=r"'fashion_mnist' is not prepared in .* could not be downloaded \(Connection"):
        load_tfds("fashion_mnist", "train", str(tmp_path))


def test_tasks_read_what_the_config_names():
    from distloop.task import load_task

    task = load_task("mnist_cnn", RunConfig(data_dir=str(SAMPLE_DIR)))
    assert task.eval_data is not None
    assert len(dict(task.eval_data())["label"]) == 2_000
