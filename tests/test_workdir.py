import json

import pytest

from distloop import workdir
from distloop.config import RunConfig
from distloop.errors import UsageError


def test_a_new_or_empty_folder_is_fine_and_stays_as_it_was(tmp_path):
    assert workdir.check(RunConfig(workdir=str(tmp_path / "new"))) == tmp_path / "new"
    assert workdir.check(RunConfig(workdir=str(tmp_path))) == tmp_path
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json.tmp").write_text("{")  # of a run that was killed at its first write
    (tmp_path / "slurm-17.out").write_text("")  # and files of others do not matter
    workdir.check(RunConfig(workdir=str(tmp_path)))


def test_the_same_run_is_accepted_also_on_another_strategy(tmp_path):
    workdir.write_json(tmp_path / "config.json", RunConfig(seed=3).to_dict())
    workdir.check(RunConfig(workdir=str(tmp_path), seed=3, replicas=2, strategy="mirrored"))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: (path.mkdir(), (path / "checkpoints").mkdir()), "holds checkpoints but no config.json"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "config.json is not JSON"),
        (
            lambda path: (path.mkdir(), workdir.write_json(path / "config.json", RunConfig(seed=1).to_dict())),
            "holds another run (seed=1 there, 0 here); give a new workdir",
        ),
    ],
)
def test_a_workdir_of_something_else_is_refused(tmp_path, prepare, sentence):
    prepare(tmp_path / "w")
    with pytest.raises(UsageError) as refusal:
        workdir.check(RunConfig(workdir=str(tmp_path / "w")))
    assert sentence in str(refusal.value)


def test_a_workdir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file; give a folder of yours"):
        workdir.check(RunConfig(workdir=str(tmp_path / "file/run")))


def test_values_that_json_does_not_have_become_null():
    assert workdir.finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == {"a": 1.0, "b": None, "c": None}


def test_no_workdir_is_refused():
    with pytest.raises(UsageError, match="workdir is not given"):
        workdir.check(RunConfig())


def test_json_is_written_whole_and_leaves_no_other_file(tmp_path):
    workdir.write_json(tmp_path / "a.json", {"b": 1})
    workdir.write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
