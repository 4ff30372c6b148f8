"""Files for the places that start a run elsewhere: a Slurm batch script, Kubernetes manifests, a script for TPU VMs.

Pure: `emit` returns the text, and whoever calls it prints it.
"""

import shlex
from collections.abc import Sequence

from distloop.errors import Stopped
from distloop.launcher import manifests
from distloop.launcher.emit_settings import Request, Settings

_LEAD_SECS = 90  # after the grace, for srun's end and the requeue; Slurm may send the signal 60 s earlier still


def emit(
    kind: str,
    settings: Settings,
    run_flags: Sequence[str],
    command: Sequence[str],
    *,
    grace_secs: int,
    max_restarts: int,
) -> str:
    """Return the file of `kind` that starts `command` under a supervisor on each host.

    `run_flags` are the flags of the run as they were typed, without those of `settings`; the two keywords are what
    --grace and --max_restarts come to. Raises UsageError.
    """
    request = Request(kind, settings, tuple(run_flags), tuple(command), grace_secs, max_restarts)
    request.check()
    return {"sbatch": _sbatch, "tpu": _tpu}.get(kind, _manifest)(request)


def _made_by(request: Request) -> str:
    flags = [f"--emit={request.kind}", *request.settings.words(), *request.run_flags]
    line = shlex.join(["python", "-m", "launch.run", *flags, "--", *request.command])
    return "\n".join(f"# {part}" for part in line.splitlines())


_KUBERNETES_NOTE = """\
# Start with `kubectl apply -f FILE`; the same file, deleted and applied again, goes on with the run.
# The supervisor in a pod restarts its workers; the pod ends once it has given up or is done. Exit codes {for_good}
# are for good. After {stopped} (stopped with a checkpoint), or when a node goes away, the pods come back without
# limit; after any other, as often as --max_restarts says.
"""
_TFJOB_NOTE = """\
# Start with `kubectl apply -f FILE`; the same file, deleted and applied again, goes on with the run.
# The operator makes a pod anew when its supervisor ends with 128 or above, such as {stopped} (stopped with a
# checkpoint); lower exit codes, such as {for_good}, are for good.
"""


def _manifest(request: Request) -> str:
    import yaml  # here, because it would slow down the start of every run

    objects = {"jobset": manifests.jobset, "job": manifests.job, "tfjob": manifests.tfjob}[request.kind](request)
    *codes, last = manifests.FOR_GOOD
    for_good = f"{', '.join(map(str, codes))} and {last}"
    note = _TFJOB_NOTE if request.kind == "tfjob" else _KUBERNETES_NOTE
    head = f"{_made_by(request)}\n{note.format(for_good=for_good, stopped=Stopped.exit_code)}"
    return head + yaml.safe_dump_all(objects, sort_keys=False, width=120)


_SBATCH = """\
#!/bin/bash
{made_by}
# Submit with `sbatch FILE`, end with `scancel`. The same script starts and resumes the run.
{options}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Before the time limit, to the supervisors and not to this shell: the run stops with a checkpoint, exit code {stopped}.
#SBATCH --signal=TERM@{lead}

# This shell hears TERM only when Slurm itself ends or requeues the job.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM

# One supervisor a node. Each ends its own workers and exits with the code of the run, so srun must not end them: it
# would send TERM, which asks for a stop and hides that code. It kills what is left {wait} s after the first has ended.
srun --kill-on-bad-exit=0 --wait={wait} --cpu-bind=none \\
    {run}
code=$?

if [ "$code" -eq {stopped} ] && [ -z "$ended_by_slurm" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
    job=$SLURM_JOB_ID
    if [ -n "${{SLURM_ARRAY_JOB_ID:-}}" ]; then
        job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
    fi
    echo "stopped with a checkpoint: job $job goes back to the queue"
    scontrol requeue "$job"
fi
exit "$code"
"""


def _sbatch(request: Request) -> str:
    settings = request.settings
    options = {
        "job-name": settings.name,
        "nodes": settings.num_hosts,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.gpus_per_host or None,
        "cpus-per-task": settings.cpus_per_host or None,
        "partition": settings.partition,
        "time": settings.time_limit,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    if not settings.cpus_per_host:
        lines += ["#SBATCH --exclusive", "#SBATCH --mem=0"]
    return _SBATCH.format(
        made_by=_made_by(request),
        options="\n".join(lines),
        stopped=Stopped.exit_code,
        lead=request.grace_secs + _LEAD_SECS,
        wait=request.grace_secs + 30,
        run=shlex.join(["distloop-run", "--cluster=slurm", *request.run_flags, "--", *request.command]),
        max_requeues=settings.max_requeues,
    )


_TPU = """\
#!/bin/bash
{made_by}
# Run it in a clone of distloop that has your task. It was never run on TPU hardware.
# The same script, run again, goes on with the run: keep its workdir where it outlives the TPU, such as gs://bucket/run.
set -euo pipefail
tpu=({name} --zone={zone})

if ! gcloud compute tpus tpu-vm describe "${{tpu[@]}}" >/dev/null 2>&1; then
    gcloud compute tpus tpu-vm create "${{tpu[@]}}" --accelerator-type={type} --version={version}
fi
echo "It costs money until: gcloud compute tpus tpu-vm delete ${{tpu[*]}}"
gcloud compute tpus tpu-vm scp --recurse --worker=all . {name}:code --zone={zone}
gcloud compute tpus tpu-vm ssh "${{tpu[@]}}" --worker=all --command='cd code && python3 -m pip install -e ".[tpu]"'

{which}
gcloud compute tpus tpu-vm ssh "${{tpu[@]}}" --worker={worker} --command={run}
"""


def _tpu(request: Request) -> str:
    settings = request.settings
    several = settings.num_hosts > 1
    run = shlex.join(["distloop-run", *request.run_flags, "--", *request.command])
    if several:
        run = f"TPU_NAME={settings.name} TPU_LOAD_LIBRARY=0 {run}"
    return _TPU.format(
        made_by=_made_by(request),
        name=settings.name,
        zone=shlex.quote(settings.tpu_zone or ""),
        type=shlex.quote(settings.tpu_type or ""),
        version=shlex.quote(settings.image or ""),
        which="# TensorFlow drives the chips of all hosts from the first."
        if several
        else "# The host drives its chips.",
        worker=0 if several else "all",
        run=shlex.quote(f"cd code && export PATH=~/.local/bin:$PATH && {run}"),
    )
