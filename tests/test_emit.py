"""What --emit prints: it is valid, it starts the command that was given, and its rules fit our exit codes."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from distloop.cluster import from_tf_config
from distloop.errors import NotFiniteError, PeerLostError, PreflightError, Stopped, UsageError
from distloop.launcher.emit import emit
from distloop.launcher.emit_settings import KINDS, Settings
from distloop.launcher.group import HUNG_CODE
from distloop.launcher.plan import make_plan
from distloop.launcher.processes import free_ports
from distloop.launcher.topology import Placement, resolve
from tests import harness

COMMAND = ("python", "-m", "launch.train", "--task=mnist_tutorial", "--workdir=/runs/a b")
SETTINGS = Settings(
    num_hosts=3, gpus_per_host=8, image="registry/image:1", volume="claim:/runs", tpu_type="v4-8", tpu_zone="zone-b"
)
IN_PODS = ("jobset", "job", "tfjob")
SCRIPTS = ("sbatch", "tpu")


def emitted(kind, settings=SETTINGS, run_flags=None, command=COMMAND):
    if run_flags is None:
        run_flags = ("--console=all",) if kind in ("tfjob", "tpu") else ("--workers=per_gpu",)
    return emit(kind, settings, run_flags, command, grace_secs=46, max_restarts=4)


def objects(kind, **changes):
    return {one["kind"]: one for one in yaml.safe_load_all(emitted(kind, **changes))}


def pod_of(kind, **changes) -> dict[str, Any]:
    made = objects(kind, **changes)
    if kind == "tfjob":
        return made["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]
    return job_of(kind, made)["template"]["spec"]


def job_of(kind, made) -> dict[str, Any]:
    return made["Job"]["spec"] if kind == "job" else made["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_begins_with_the_command_that_made_it(kind):
    command = (*COMMAND, "--note=two\nlines")
    lines = emitted(kind, command=command).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("# python")))
    words = shlex.split("\n".join(line.removeprefix("# ") for line in lines[start : start + 2]))
    assert words[:4] == ["python", "-m", "launch.run", f"--emit={kind}"]
    own, rest = words[4 : words.index("--")], words[words.index("--") + 1 :]
    assert own[:-1] == SETTINGS.words()
    assert own[-1] in ("--workers=per_gpu", "--console=all")
    assert tuple(rest) == command


def closed(schema):
    """Return an OpenAPI schema that takes only the fields it names, as the API server does with strict validation."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def validator(name):
    schema = json.loads(gzip.decompress((Path(__file__).parent / f"data/{name}.openapi.json.gz").read_bytes()))
    schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes itself, so the definition leaves it open
    return jsonschema.Draft202012Validator(closed(schema))


SHAPES = {
    "eight GPUs a host": SETTINGS,
    "one host without GPU": Settings(image="image", volume="claim:/runs"),
    "cores, no volume": Settings(num_hosts=2, image="image", cpus_per_host=4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["jobset", "tfjob"])
def test_custom_resources_are_valid_against_their_published_schemas(kind, shape):
    command = COMMAND if SHAPES[shape].volume else ("train", "--workdir=gs://bucket/run")
    (made,) = objects(kind, settings=SHAPES[shape], command=command).values()
    validator(kind).validate(made)
    # Their pods are Kubernetes' own, which names more of what cannot be.
    template = {"metadata": {"name": "pod"}, "spec": {**pod_of(kind, settings=SHAPES[shape], command=command)}}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, "1.31", strict=True)


@pytest.mark.parametrize("kind", ["jobset", "tfjob"])
def test_the_schemas_refuse_a_field_that_does_not_exist(kind):
    (made,) = objects(kind).values()
    made["spec"]["failurePolicyy"] = {}
    with pytest.raises(jsonschema.ValidationError, match="failurePolicyy"):
        validator(kind).validate(made)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_job_and_its_service_are_valid(shape, version):
    command = COMMAND if SHAPES[shape].volume else ("train", "--workdir=gs://bucket/run")
    made = objects("job", settings=SHAPES[shape], command=command)
    assert list(made) == ["Service", "Job"]
    for one in made.values():
        kubernetes_validate.validate(one, version, strict=True)


def answer_of_job(rules, code, *, disrupted=False):
    """Return what the Job controller does with a failed pod: the action, and the message of the Job's failure.

    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    for index, rule in enumerate(rules):
        if any(condition["type"] == "DisruptionTarget" for condition in rule.get("onPodConditions", ())) and disrupted:
            return rule["action"], f"Pod ns/pod has condition DisruptionTarget matching FailJob rule at index {index}"
        if (codes := rule.get("onExitCodes")) and code in codes["values"]:
            assert codes["operator"] == "In"
            what = f"Container main for pod ns/pod failed with exit code {code}"
            return rule["action"], f"{what} matching FailJob rule at index {index}"
    return "Count", "Job has reached the specified backoff limit"


def answer_of_jobset(made, code, *, disrupted=False):
    """Return what the JobSet controller does then: https://jobset.sigs.k8s.io/docs/tasks/failure_policy/."""
    job = job_of("jobset", made)
    action, message = answer_of_job(job["podFailurePolicy"]["rules"], code, disrupted=disrupted)
    assert job["backoffLimit"] == 0  # so Count fails the Job as well
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    for rule in made["JobSet"]["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


FOR_GOOD = [1, UsageError.exit_code, NotFiniteError.exit_code, PreflightError.exit_code]
COUNTED = [HUNG_CODE, 130, 137, PeerLostError.exit_code]


@pytest.mark.parametrize(
    ("code", "disrupted", "jobset", "job"),
    [
        *[(code, False, "FailJobSet", "FailJob") for code in FOR_GOOD],
        *[(code, False, "RestartJobSet", "Count") for code in (*COUNTED, 139, 255)],
        (Stopped.exit_code, False, "RestartJobSetAndIgnoreMaxRestarts", "Ignore"),
        *[(code, True, "RestartJobSetAndIgnoreMaxRestarts", "Ignore") for code in (Stopped.exit_code, 137, 69)],
    ],
)
def test_the_rules_follow_the_exit_codes(code, disrupted, jobset, job):
    made = objects("job")
    assert answer_of_jobset(objects("jobset"), code, disrupted=disrupted) == jobset
    assert answer_of_job(job_of("job", made)["podFailurePolicy"]["rules"], code, disrupted=disrupted)[0] == job


def test_the_page_on_exit_codes_and_the_rules_name_the_same_codes():
    page = (Path(__file__).parents[1] / "docs/ending.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert documented == {0, *FOR_GOOD, *COUNTED, Stopped.exit_code}


def test_restarts_are_as_many_as_were_asked_for():
    assert objects("jobset")["JobSet"]["spec"]["failurePolicy"]["maxRestarts"] == 4
    assert job_of("job", objects("job"))["backoffLimit"] == 4 * 3  # three pods fail together
    tfjob = objects("tfjob")["TFJob"]["spec"]
    assert tfjob["runPolicy"]["backoffLimit"] == 4 * 3
    assert tfjob["tfReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"


@pytest.mark.parametrize("kind", IN_PODS)
def test_a_pod_has_the_grace_and_then_time_to_report(kind):
    pod = pod_of(kind)
    assert pod["terminationGracePeriodSeconds"] == 46 + 15
    (container,) = pod["containers"]
    assert f"--report={container['terminationMessagePath']}" in container["command"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


@pytest.mark.parametrize(
    ("kind", "hosts"),
    [
        ("jobset", [f"distloop-host-0-{index}.distloop" for index in range(3)]),
        ("job", [f"distloop-{index}.distloop" for index in range(3)]),
        ("tfjob", None),
    ],
)
def test_a_pod_knows_the_names_of_all_and_runs_the_command(kind, hosts):
    command = pod_of(kind)["containers"][0]["command"]
    own, rest = command[: command.index("--")], command[command.index("--") + 1 :]
    assert own[0] == "distloop-run"
    assert [word for word in own if word.startswith("--hosts=")] == ([f"--hosts={','.join(hosts)}"] if hosts else [])
    assert {"--workers=per_gpu", "--console=all"} & set(own)
    assert tuple(rest) == COMMAND


@pytest.mark.parametrize(("kind", "workers"), [("jobset", 1), ("jobset", 2), ("job", 1), ("job", 2)])
def test_pods_form_one_cluster_of_all_workers(kind, workers):
    command = pod_of(kind, run_flags=(f"--workers={workers}",))["containers"][0]["command"]
    own, rest = command[1 : command.index("--")], command[command.index("--") + 1 :]
    given = dict(word.removeprefix("--").split("=", 1) for word in own)
    placement = Placement(workers=given["workers"], hosts=tuple(given["hosts"].split(",")), workdir=COMMAND[-1])
    plans = []
    for index in range(SETTINGS.num_hosts):
        environment = {"JOB_COMPLETION_INDEX": str(index)}
        topology = resolve(placement, environment, gpus=[], is_here=lambda _: False)
        plans += make_plan(topology, rest, environment, gpus=[], cores=8)
    assert [worker.rank for worker in plans] == list(range(3 * workers))
    clusters = [from_tf_config(worker.environment["TF_CONFIG"]) for worker in plans]
    assert [one.index for one in clusters] == [worker.rank for worker in plans]
    assert len({one.addresses for one in clusters}) == 1
    hosts = [address.partition(":")[0] for address in clusters[0].addresses]
    assert hosts == [host for host in given["hosts"].split(",") for _ in range(workers)]
    assert len(set(clusters[0].addresses)) == 3 * workers
    assert {worker.command for worker in plans} == {COMMAND}


def test_the_names_are_those_that_kubernetes_gives_to_pods():
    jobset = objects("jobset")["JobSet"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"]
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}"
    assert f"--hosts={first}," in " ".join(pod_of("jobset")["containers"][0]["command"])

    made = objects("job")
    job, service = made["Job"], made["Service"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--hosts={first}," in " ".join(pod_of("job")["containers"][0]["command"])
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["publishNotReadyAddresses"]


def test_a_start_timeout_of_ones_own_replaces_that_for_pods():
    def timeouts(run_flags):
        command = pod_of("jobset", run_flags=run_flags)["containers"][0]["command"]
        return [word for word in command if word.startswith("--start_timeout")]

    assert timeouts(()) == ["--start_timeout=900"]
    assert timeouts(("--start_timeout=60",)) == ["--start_timeout=60"]


def test_kubernetes_replaces_nothing_in_the_command():
    command = ("sh", "-c", "echo $(date) $HOME", "--workdir=gs://bucket/run")
    assert "echo $$(date) $HOME" in pod_of("jobset", command=command)["containers"][0]["command"]


@pytest.mark.slow
def test_what_two_pods_run_trains_here(tmp_path):
    train = ("-m", "launch.train", "--task=mnist_tutorial", "--train_steps=5", f"--workdir={tmp_path / 'run'}")
    settings = Settings(num_hosts=2, image="image", volume=f"claim:{tmp_path}")
    command, of_job = (
        pod_of(kind, settings=settings, run_flags=(), command=(sys.executable, *train))["containers"][0]["command"]
        for kind in ("jobset", "job")
    )
    assert command[0] == of_job[0] == "distloop-run"
    assert command[2:] == of_job[2:]  # all but the names of the hosts
    names = command[1].removeprefix("--hosts=").split(",")
    own_names = [f"127.0.0.1:{port}" for port in free_ports(2)]
    words = [f"--hosts={','.join(own_names)}", *command[2:]]
    assert len(names) == 2
    pods = [harness.start(["-m", "launch.run", *words], fresh=True, JOB_COMPLETION_INDEX=str(k)) for k in range(2)]
    try:
        for pod in pods:
            code, out, err = harness.finish(pod)
            assert code == 0, out + err
    finally:
        for pod in pods:
            if pod.poll() is None:
                harness.kill(pod)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 5


def written(kind, folder):
    """Return the paths of a script that has all settings and of one that has few."""
    for name, settings in {"full": SETTINGS, "plain": Settings(image="i", tpu_type="v4-8", tpu_zone="z")}.items():
        (folder / name).write_text(emitted(kind, settings=settings))
        yield folder / name


@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_are_bash(kind, tmp_path):
    for script in written(kind, tmp_path):
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_shellcheck_has_no_warning_for_scripts(kind, tmp_path):
    for script in written(kind, tmp_path):
        subprocess.run(["shellcheck", "--severity=warning", script], check=True)


def test_a_batch_script_asks_for_what_was_said():
    settings = Settings(num_hosts=2, name="mnist", cpus_per_host=6, gpus_per_host=1, partition="short", time_limit="60")
    options = re.findall(r"^#SBATCH --(.*)$", emitted("sbatch", settings=settings), flags=re.MULTILINE)
    assert options == [
        *("job-name=mnist", "nodes=2", "ntasks-per-node=1", "gpus-per-node=1", "cpus-per-task=6", "partition=short"),
        *("time=60", "output=%x-%j.log", "open-mode=append", "requeue", "signal=TERM@136"),
    ]
    whole = re.findall(r"^#SBATCH --(.*)$", emitted("sbatch", settings=Settings()), flags=re.MULTILINE)
    assert {"exclusive", "mem=0"} < set(whole)


@pytest.mark.parametrize(("hosts", "worker"), [(1, "all"), (4, "0")])
def test_the_script_for_tpus_runs_the_command_as_given(hosts, worker, tmp_path):
    script = tmp_path / "tpu.sh"
    script.write_text(emitted("tpu", settings=Settings(hosts, image="v2", tpu_type="v4-32", tpu_zone="zone-b")))
    # The commands as gcloud would get them; describe fails for a TPU that does not exist yet.
    stub = f'gcloud() {{ printf "%s\\0" "$@" >>{tmp_path}/calls; echo >>{tmp_path}/calls; [ "$4" != describe ]; }}'
    subprocess.run(["bash", "-c", f"{stub}; export -f gcloud; bash {script}"], check=True, capture_output=True)
    calls = [line.rstrip("\0").split("\0") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[3] for call in calls] == ["describe", "create", "scp", "ssh", "ssh"]
    assert {"distloop", "--zone=zone-b"} <= {word.partition(":")[0] for call in calls for word in call}
    assert f"--worker={worker}" in calls[-1]
    remote = calls[-1][-1].removeprefix("--command=").split(" && ")[-1]
    words = shlex.split(remote)
    assert ("TPU_NAME=distloop" in words) == (hosts > 1)
    assert tuple(words[words.index("--") + 1 :]) == COMMAND


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("slurm", {}, "emit is 'slurm'; expected one of sbatch, jobset, job, tfjob, tpu"),
        ("sbatch", {"command": ()}, "has no command; write it behind --"),
        ("sbatch", {"settings": Settings(num_hosts=0)}, "num_hosts is 0; expected at least 1"),
        ("sbatch", {"settings": Settings(gpus_per_host=-1)}, "gpus_per_host is -1; expected at least 0"),
        ("sbatch", {"settings": Settings(name="My_Run")}, "name is 'My_Run'; expected at most 40 lower-case letters"),
        ("sbatch", {"settings": Settings(name="n" * 41)}, "expected at most 40"),
        ("sbatch", {"run_flags": ("--hosts=a,b",)}, "--emit=sbatch writes --hosts itself; leave it out"),
        ("job", {"run_flags": ("--report", "x")}, "--emit=job writes --report itself"),
        (
            "job",
            {"settings": Settings(volume="c:/runs")},
            "--emit=job needs --image: container image that has distloop",
        ),
        ("tpu", {"settings": Settings(image="v2", tpu_type="v4-8")}, "--emit=tpu needs --tpu_zone: zone of the TPU"),
        ("jobset", {"settings": Settings(image="i", volume="/runs")}, "volume is '/runs'; expected CLAIM:/path"),
        ("jobset", {"settings": Settings(image="i")}, "workdir /runs/a b is on no volume that all pods share"),
        ("jobset", {"settings": Settings(image="i", volume="c:/run")}, "workdir /runs/a b is on no volume"),
    ],
)
def test_what_cannot_work_is_one_sentence(kind, changes, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        emitted(kind, **changes)
    assert str(caught.value).endswith(".")


def test_emitting_imports_yaml_only_when_it_writes_yaml():
    script = "import sys, distloop.launcher.emit; print('yaml' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(["python3", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
