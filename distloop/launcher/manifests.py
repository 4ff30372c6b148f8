"""Kubernetes objects for a run, as dicts: a JobSet, an indexed Job with its Service, a TFJob.

Failure rules follow the exit codes of docs/ending.md. Kubernetes looks at them only once a supervisor has given up: it
restarts its own workers before.
"""

from typing import Any

from distloop.errors import NotFiniteError, PreflightError, Stopped, UsageError
from distloop.launcher.emit_settings import Request

FOR_GOOD = (1, UsageError.exit_code, NotFiniteError.exit_code, PreflightError.exit_code)
REPORT = "/dev/termination-log"  # where Kubernetes reads a message for the pod's status from
_START_SECS = 900  # a lost node's pods are gone after 300 s, and new ones may need new nodes
_WAY_OUT_SECS = 15  # for the report, once the grace of the workers is over
_REPLICATED_JOB = "host"


def jobset(request: Request) -> list[dict[str, Any]]:
    """Return a JobSet of one indexed Job: whatever fails, all pods are made anew."""
    name, hosts = request.settings.name, request.settings.num_hosts
    addresses = [f"{name}-{_REPLICATED_JOB}-0-{index}.{name}" for index in range(hosts)]
    # The message that a Job fails with ends in the index of the rule: 0 and 1 are no fault of the run, 2 is for good.
    conditions = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [Stopped.exit_code]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(FOR_GOOD)}},
    ]
    rules = [
        _jobset_rule("stopped", "RestartJobSetAndIgnoreMaxRestarts", "[01]"),
        _jobset_rule("failedForGood", "FailJobSet", "2"),
    ]
    job = _job_spec(request, pod=_pod(request, addresses), backoff_limit=0, rules=conditions)
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        # Blocking: no pod of the last attempt may still write when the next one starts.
        "failurePolicy": {
            "maxRestarts": request.max_restarts,
            "restartStrategy": "BlockingRecreate",
            "rules": rules,
        },
        "replicatedJobs": [{"name": _REPLICATED_JOB, "replicas": 1, "template": {"spec": job}}],
    }
    return [_object("jobset.x-k8s.io/v1alpha2", "JobSet", name, spec)]


def job(request: Request) -> list[dict[str, Any]]:
    """Return a headless Service and an indexed Job: a pod that fails is replaced, and its peers wait for it."""
    name, hosts = request.settings.name, request.settings.num_hosts
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [Stopped.exit_code]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(FOR_GOOD)}},
    ]
    selector = {"batch.kubernetes.io/job-name": name}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}
    pod = {"subdomain": name, **_pod(request, [f"{name}-{index}.{name}" for index in range(hosts)])}
    # Every pod of a group that fails counts.
    spec = _job_spec(request, pod=pod, backoff_limit=request.max_restarts * hosts, rules=rules)
    return [_object("v1", "Service", name, service), _object("batch/v1", "Job", name, spec)]


def tfjob(request: Request) -> list[dict[str, Any]]:
    """Return a TFJob for the training operator, which sets TF_CONFIG: one worker a pod."""
    hosts = request.settings.num_hosts
    pod = _pod(request, [])
    del pod["restartPolicy"]  # the operator's own comes from the replica's
    pod["containers"][0]["name"] = "tensorflow"  # the operator gives TF_CONFIG to no other
    worker = {"replicas": hosts, "restartPolicy": "ExitCode", "template": {"spec": pod}}
    spec = {
        "runPolicy": {"backoffLimit": request.max_restarts * hosts, "cleanPodPolicy": "Running"},
        "successPolicy": "AllWorkers",
        "tfReplicaSpecs": {"Worker": worker},
    }
    return [_object("kubeflow.org/v1", "TFJob", request.settings.name, spec)]


def _object(version: str, kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _jobset_rule(name: str, action: str, index: str) -> dict[str, Any]:
    patterns = [f"matching FailJob rule at index {index}$"]
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": patterns,
    }


def _job_spec(
    request: Request, *, pod: dict[str, Any], backoff_limit: int, rules: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",  # gives each pod JOB_COMPLETION_INDEX and a stable host name
        "completions": request.settings.num_hosts,
        "parallelism": request.settings.num_hosts,
        "backoffLimit": backoff_limit,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }


def _pod(request: Request, addresses: list[str]) -> dict[str, Any]:
    settings = request.settings
    flags = [
        *([f"--hosts={','.join(addresses)}"] if len(addresses) > 1 else []),
        *([] if request.has_run_flag("start_timeout") else [f"--start_timeout={_START_SECS}"]),
        f"--report={REPORT}",
        *request.run_flags,
    ]
    limits = {"nvidia.com/gpu": settings.gpus_per_host} if settings.gpus_per_host else {}
    requests = {"cpu": settings.cpus_per_host} if settings.cpus_per_host else {}
    volumes, mounts = _volumes(settings.volume, memory=settings.gpus_per_host > 0)
    container = {
        "name": "distloop",
        "image": settings.image,
        "command": [_literal(word) for word in ("distloop-run", *flags, "--", *request.command)],
        "resources": {name: value for name, value in (("limits", limits), ("requests", requests)) if value},
        "volumeMounts": mounts,
        "terminationMessagePath": REPORT,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": request.grace_secs + _WAY_OUT_SECS,
        "containers": [container],
        "volumes": volumes,
    }


def _volumes(volume: str | None, *, memory: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes, mounts = [], []
    if volume:
        claim, _, path = volume.partition(":")
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "runs", "mountPath": path})
    if memory:  # NCCL shares memory between the processes of a pod, which has 64 MB of it by default
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    return volumes, mounts


def _literal(word: str) -> str:
    """Keep Kubernetes from replacing $(NAME)."""
    return word.replace("$(", "$$(")
