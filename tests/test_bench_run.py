"""The command that measures, with real processes: every mode, its records, and its errors."""

import math
import statistics

import pytest

from benchmarks import records
from tests import harness

SHORT = ("--launches=1", "--windows=3", "--window_secs=0.02", "--warmup_secs=0.5", "--batch=16")


def measure(folder, *flags, code=0):
    """Run the command; return its records by kind."""
    found, out, err = harness.run(
        "-m", "benchmarks.run", *SHORT, f"--output={folder}", *flags, fresh=True, limit_secs=600
    )
    assert found == code, out + err
    lines = records.read([folder])
    return {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}


def of_mode(found, mode):
    return [line for line in found["result"] if line["case"]["mode"] == mode]


def test_a_step_is_measured_split_and_judged_and_everything_is_on_record(tmp_path):
    found = measure(tmp_path, "--workload=null", "--task_args=gradient_bytes=4000,flops=1e8")
    (env,) = found["env"]
    assert [line["case"]["mode"] for line in found["run"]] == ["step", "noupdate"]
    assert {line["env"] for line in found["run"]} == {env["hash"]}
    assert len(found["window"]) == 6
    (result,) = of_mode(found, "step")
    assert result["throughput"]["median"] == pytest.approx(16 / (result["step_ms"]["median"] / 1e3))
    assert sum(value or 0 for value in result["breakdown_ms"].values()) == pytest.approx(result["step_ms"]["median"])
    assert result["params"] == 1000
    (run, _) = found["run"]
    assert run["facts"]["gradient_bytes"] == {"dense": 4000, "sparse": 0}
    assert len(run["facts"]["losses"]) == 10
    assert all(map(math.isfinite, run["facts"]["losses"]))
    assert run["argv"][:4] == ["python", "-m", "benchmarks.run", SHORT[0]]
    assert found["verdict"][0]["key"] == result["key"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload=nothing"], "there is no task 'nothing'; expected one of"),
        (["--mode=guess"], "value should be one of"),
        (["--peers=horovod"], "there is no peer 'horovod'; expected some of distloop, loop"),
        (["--replicas=0"], "replicas is 0; expected whole numbers of at least 1."),
        (["--replicas=two"], "replicas has 'two'; expected a number."),
        (["--workers=nan"], "workers has 'nan'; expected a number."),
        (["--mode=ablate", "--vary=seed=1", "--vary=seed=2"], "vary names a setting twice (seed=1, seed=2)"),
        (["--mode=comm"], "comm measures what replicas exchange, and there is one; give --replicas or --workers."),
        (["--jit_compile=auto"], "jit_compile is auto; measure both instead: --mode=ablate --vary='jit_compile=0|1'."),
        (["--mode=ablate"], "ablate varies nothing; expected --vary such as --vary='jit_compile=0|1'."),
        (["--mode=ablate", "--vary=colour=1|2"], "vary is 'colour=1|2'; expected SETTING=VALUE|VALUE with one of"),
        (
            ["--mode=ablate", "--vary=steps_per_call=many"],
            "vary has the value 'many'; expected a number, as for the flag.",
        ),
        (["--mode=ablate", "--vary=precision=int4"], "precision is 'int4'"),
        (["--mode=sweep", "--scaling=strong", "--batch=3", "--replicas=2"], "cannot be shared by 2 replicas"),
        (["--steps_per_call=0"], "steps_per_call is 0"),
        (["more"], "there are arguments that are no flags: more"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, flags, message):
    code, out, err = harness.run("-m", "benchmarks.run", f"--output={tmp_path / 'new'}", *flags)
    assert code == 64
    assert message in err.replace("\n", " ")
    assert not out
    assert not (tmp_path / "new").exists()


def test_what_only_the_measured_process_can_see_is_one_sentence_too(tmp_path):
    code, _, err = harness.run(
        "-m", "benchmarks.run", *SHORT, f"--output={tmp_path}", "--workload=null", "--task_args=colour=3", fresh=True
    )
    assert code == 64
    assert err.startswith("distloop: ")
    assert "colour" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_batches_that_come_from_the_host_or_late_are_seen(tmp_path):
    found = measure(tmp_path, "--mode=h2d", "--workload=null", "--task_args=gradient_bytes=4000", "--nosplit")
    assert [line["case"]["mode"] for line in found["result"]] == ["h2d"]
    late = measure(tmp_path / "late", "--mode=input", "--workload=null", "--task_args=gradient_bytes=4000,input_ms=50")
    (result,) = late["result"]
    assert 50 <= result["step_ms"]["median"] < 100
    waited = [line["input_wait_s"] / line["seconds"] for line in late["window"]]
    assert statistics.median(waited) > 0.5  # most of the time, however busy the machine is with other things


@pytest.mark.slow
def test_replicas_and_processes_exchange_what_is_told_and_a_sweep_has_its_efficiency(tmp_path):
    exchanged = measure(
        tmp_path / "comm", "--mode=comm", "--workers=2", "--comm_bytes=1e5", "--workload=mnist_tutorial"
    )
    points = {line["what"]: line for line in exchanged["comm_point"]}
    assert points["sweep"]["bytes"] == 100_000
    assert points["mnist_tutorial"]["bytes"] == 4 * exchanged["run"][0]["facts"]["params"]
    assert all(line["busbw"] == pytest.approx(line["algbw"]) for line in exchanged["comm_point"])  # two replicas
    assert {line["rank"] for line in exchanged["window"]} == {0, 1}
    alone = measure(tmp_path / "alone", "--mode=nocomm", "--replicas=2", "--workload=mnist_tutorial")
    assert [line["case"]["replicas"] for line in alone["result"]] == [2]
    swept = measure(tmp_path / "sweep", "--mode=sweep", "--workers=1,2", "--nosplit", "--workload=mnist_tutorial")
    one, two = swept["result"]
    assert one["efficiency"] is None
    assert two["efficiency"]["baseline"] == one["key"]
    expected = two["throughput"]["median"] / (2 * one["throughput"]["median"])
    assert two["efficiency"]["value"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_worker_that_is_slow_is_found(tmp_path):
    found = measure(tmp_path, "--workload=tests.delayed_task:make_task", "--workers=2")
    (result,) = of_mode(found, "step")
    assert result["skew_ms"]["persistent"] > 10  # 30 ms more than the other: 15 more than the mean
    assert found["verdict"][0]["bound"] == "skew"


@pytest.mark.slow
def test_sparse_gradients_are_exchanged_as_rows(tmp_path):
    sizes = "--task_args=rows=1000,width=8,dense=16"
    found = measure(tmp_path, "--mode=comm", "--workload=dlrm_small", sizes, "--replicas=2", "--comm_bytes=")
    (run,) = found["run"]
    assert run["facts"]["gradient_bytes"]["sparse"] > 0
    assert run["facts"]["gradient_bytes"]["dense"] < 4 * run["facts"]["params"]


@pytest.mark.slow
def test_a_whole_training_tells_what_evaluations_and_checkpoints_take(tmp_path):
    flags = ["--mode=e2e", "--nosplit", "--workload=mnist_tutorial", "--train_steps=150", "--batch=64"]
    found = measure(tmp_path, *flags, "--eval_every_steps=50", "--checkpoint_every_steps=50")
    (window,) = found["window"]
    assert window["steps"] == 100
    assert window["eval_s"] > 0
    assert window["save_s"] > 0
    assert found["result"][0]["throughput"]["median"] == pytest.approx(6400 / window["seconds"])


@pytest.mark.slow
def test_settings_are_varied_and_the_start_is_told(tmp_path):
    found = measure(tmp_path / "ablate", "--mode=ablate", "--vary=steps_per_call=1|50", "--workload=mnist_tutorial")
    assert [line["case"]["settings"] for line in found["result"]] == [{"steps_per_call": 1}, {}]
    started = measure(tmp_path / "startup", "--mode=startup", "--workload=mnist_tutorial")
    (result,) = started["result"]
    assert {"import", "build", "data", "trace", "compile", "first_step", "save", "restore"} <= result[
        "startup_s"
    ].keys()
    assert all(seconds >= 0 for seconds in result["startup_s"].values())


@pytest.mark.slow
def test_peers_train_alike_and_one_that_cannot_is_a_row_with_its_error(tmp_path):
    # The other two: test_bench_peers.py and the committed report.
    measured = ["distloop", "loop_in_graph", "fit_many", "orbit"]
    found = measure(tmp_path, "--mode=peers", f"--peers={','.join(measured)}", "--workload=mnist_tutorial")
    rows = {line["case"]["peer"]: line for line in found["result"]}
    assert list(rows) == measured
    for peer, row in rows.items():
        if row["error"]:
            assert peer == "orbit"
            assert "not installed" in row["error"]
        else:
            assert row["losses"] == pytest.approx(rows["distloop"]["losses"], rel=1e-5)
    several = measure(tmp_path / "two", "--mode=peers", "--peers=distloop,fit", "--workers=2", "--workload=null")
    rows = {line["case"]["peer"]: line for line in several["result"]}
    assert rows["distloop"]["error"] is None
    assert rows["fit"]["error"].startswith("ValueError: ")  # Keras's own
    assert rows["fit"]["throughput"] is None
