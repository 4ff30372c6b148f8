"""Benchmark records as `benchmarks.run` writes them, with made-up numbers, for tests of what reads them."""

import json
from pathlib import Path

from benchmarks import curves, results
from benchmarks.cases import Case

SCHEMA = "distloop.bench/1"
TIME = "2026-01-02T03:04:05.678901+00:00"
GPU, CPU = "envgpu000001", "envcpu000001"
PEER_SPEEDS = {"loop": 41000.0, "loop_in_graph": 44500.0, "fit": 30100.0, "fit_many": 43900.0, "distloop": 44800.0}
PEER_ERROR = "orbit is not installed; install distloop[bench]."
# Throughput (images/s) of a weak sweep: (workers, replicas in each) to rate.
SWEEP = {(1, 1): 1410.0, (1, 2): 2760.0, (1, 4): 5290.0, (2, 4): 9480.0}


def record(kind, run="run1", **fields):
    return {"schema": SCHEMA, "kind": kind, "run": run, "time": TIME, **fields}


def env(hash_=GPU, run="run1", device="NVIDIA H200", devices=4, **fields):
    hardware = dict(device=device, devices=devices, device_memory_bytes=150_754_820_096, driver="570.86", hosts=2)
    hardware |= dict(cpu="AMD EPYC 9654", cores=192, memory_bytes=1_621_000_000_000)
    versions = {"distloop": "0.6", "tensorflow": "2.21.0", "keras": "3.15.1", "python": "3.11.9", "nccl": None}
    environment = {"TF_GPU_THREAD_MODE": "gpu_private"}
    fields = {"versions": versions, "hardware": hardware, "environment": environment, **fields}
    return record("env", run=run, hash=hash_, **fields)


def interval(median, spread=0.01, launches=3):
    each = [median * (1 + spread * (i - launches // 2) / launches) for i in range(launches)]
    return dict(median=median, low=median * (1 - spread), high=median * (1 + spread), launches=each)


def launches_of(case, run="run1", env_hash=GPU, step_s=0.05, losses=(2.5, 2.25), seed=7):
    """Return the `run` and `window` lines of three launches of a case."""
    found = []
    for index in range(3):
        launch = f"{run}-{case.key}-{index}"
        facts = dict(
            global_batch=case.global_batch, params=25_557_032, unit="images", units_per_example=1, hosts=case.workers
        )
        facts |= dict(gradient_bytes={"dense": 102_228_128, "sparse": 0}, flops_per_example=24.6e9)
        facts |= dict(startup_s={"import": 4.5, "first_step": 11.25}, losses=list(losses), warnings=[])
        facts |= dict(memory={"device_peak_bytes": 9_663_676_416, "host_peak_bytes": 3_221_225_472})
        argv = ["python", "-m", "benchmarks.run", f"--workload={case.workload}", "--mode=sweep"]
        fields = dict(launch=launch, index=index, key=case.key, case=case.to_dict(), argv=argv, commit="0a1b2c3d4e5f")
        found.append(record("run", run=run, **fields, dirty=False, seed=seed, env=env_hash, facts=facts))
        for window in range(4):
            seconds = 10 * step_s * (1 + 0.01 * window)
            times = dict(seconds=seconds, input_wait_s=0.001, host_gap_s=0.002)
            for rank in range(case.workers):
                fields = dict(launch=launch, rank=rank, index=window, steps=10, **times)
                found.append(record("window", run=run, **fields))
    return found


def result(case, rate, run="run1", env_hash=GPU, unit="images", comm=0.0, input_wait=0.0, **fields):
    """Return the `result` line of a case at `rate` units a second, its step split in five parts."""
    step = 1000 * case.global_batch / rate
    parts = dict(comm_exposed=comm, input_wait=input_wait, host_gap=0.02 * step, optimizer=0.05 * step)
    parts["compute"] = step - sum(parts.values())
    spread = dict(low=0.99 * step, high=1.01 * step, p5=0.98 * step, p50=step, p95=1.03 * step, p99=1.06 * step)
    flops = dict(per_example=24.6e9, formula=results.MFU, peak=989e12, peak_source="H200 bf16")
    flops["mfu"] = flops["per_example"] * rate / case.total_replicas / flops["peak"]
    defaults = dict(
        key=case.key,
        case=case.to_dict(),
        env=env_hash,
        launches=[f"{run}-{case.key}-{index}" for index in range(3)],
        global_batch=case.global_batch,
        params=25_557_032,
        gradient_bytes={"dense": 102_228_128, "sparse": 0},
        unit=unit,
        units_per_example=1,
        throughput=interval(rate),
        per_device=rate / case.total_replicas,
        step_ms=dict(median=step, mean=1.001 * step, mad=0.003 * step, cv=0.008, **spread),
        breakdown_ms=parts,
        efficiency=None,
        flops=flops,
        memory={"device_peak_bytes": 9_663_676_416, "host_peak_bytes": 3_221_225_472},
        startup_s={"import": 4.5, "first_step": 11.25},
        skew_ms=None,
        losses=[2.5, 2.25],
        warnings=[],
        error=None,
    )
    return record("result", run=run, **{**defaults, **fields})


def failed(case, error, **fields):
    """Return the `result` line of a case of which no launch came to its end."""
    nothing = ("throughput", "per_device", "step_ms", "breakdown_ms", "flops", "memory", "startup_s")
    return result(case, 1.0, **{**dict.fromkeys(nothing), "launches": [], "losses": [], "error": error, **fields})


def verdict(case, bound, sentence, advice, run="run1"):
    return record("verdict", run=run, key=case.key, bound=bound, sentence=sentence, advice=advice)


def comm_point(case, size, hosts=2, run="run1"):
    seconds = 60e-6 + size / 6e9
    n = case.total_replicas
    algbw = size / seconds
    fields = dict(
        launch=f"{run}-{case.key}-0", key=case.key, what="sweep", bytes=size, tensors=1, replicas=n, hosts=hosts
    )
    rates = dict(algbw=algbw, busbw=algbw * 2 * (n - 1) / n)
    return record("comm_point", run=run, **fields, seconds=interval(seconds, spread=0.04), **rates)


def on_gpus():
    """Return the lines of one invocation: a sweep, peers of which one fails, communication, real data."""
    lines = [env()]
    first = Case("resnet50", replicas=1, per_replica_batch=128)
    for (workers, replicas), rate in SWEEP.items():
        case = Case("resnet50", workers=workers, replicas=replicas, per_replica_batch=128)
        share = rate / SWEEP[1, 1] / case.total_replicas
        efficiency = dict(value=share, baseline=first.key, kind="weak")
        skew = dict(persistent=1.5, jitter=0.75) if workers > 1 else None
        exposed = 0.9 * (1000 * case.global_batch / rate - 1000 * 128 / SWEEP[1, 1])
        lines += launches_of(case, step_s=case.global_batch / rate)
        lines.append(result(case, rate, comm=exposed, efficiency=efficiency, skew_ms=skew))
        if workers > 1:
            sentence = "communication-bound: 15.5 of 108 ms a step"
            lines.append(
                verdict(
                    case, "communication", sentence, "a larger batch a replica or --micro_batches exchanges less often"
                )
            )
    real = Case("resnet50", mode="e2e", replicas=4, per_replica_batch=128, settings={"prefetch": 2})
    lines += launches_of(real, step_s=0.16)
    warnings = ["the processor's governor is powersave: times may vary."]
    lines.append(result(real, 3200.0, input_wait=61.0, warnings=warnings))
    sentence = "input-bound: 61 of 160 ms a step"
    lines.append(verdict(real, "input", sentence, "on_disk() for what is read again, --data_service for more hosts"))
    for peer, rate in PEER_SPEEDS.items():
        case = Case("mnist_cnn", peer=peer, replicas=4, per_replica_batch=64)
        lines += launches_of(case, step_s=case.global_batch / rate)
        lines.append(result(case, rate, breakdown_ms=None, losses=[2.302, 1.871]))
    lines.append(failed(Case("mnist_cnn", peer="orbit", replicas=4, per_replica_batch=64), PEER_ERROR))
    for power in range(5, 15):
        settings = {"task_args": f"gradient_bytes={4**power}"}
        all_reduce = Case("null", mode="comm", workers=2, replicas=4, per_replica_batch=1, settings=settings)
        lines += launches_of(all_reduce)
        lines += [result(all_reduce, 1000.0 / power, breakdown_ms=None, flops=None), comm_point(all_reduce, 4**power)]
    fits = curves.of_sweeps(lines) + curves.of_all_reduces(line for line in lines if line["kind"] == "comm_point")
    return lines + [record("fit", **fields) for fields in fits]


def on_cpu():
    """Return the lines of an invocation elsewhere: a device without a peak, parts not measured, a strong sweep."""
    hardware = dict(
        device="CPU", devices=2, device_memory_bytes=None, cpu="Intel Xeon", cores=2, memory_bytes=25 * 10**9
    )
    lines = [env(CPU, run="run2", hardware=hardware, environment={})]
    first = Case("mnist_cnn", per_replica_batch=64)
    for replicas, rate in {1: 3190.0, 2: 3420.0}.items():
        case = Case("mnist_cnn", replicas=replicas, per_replica_batch=64 // replicas)
        efficiency = dict(value=rate / 3190 / replicas, baseline=first.key, kind="strong")
        flops = dict(per_example=2.4e6, formula=results.MFU, mfu=None, peak=None, peak_source=None)
        memory = {"device_peak_bytes": None, "host_peak_bytes": 805_306_368}
        step = 1000 * 64 / rate
        parts = dict(compute=0.9 * step, comm_exposed=None, input_wait=None, host_gap=0.1 * step, optimizer=None)
        fields = dict(flops=flops, memory=memory, breakdown_ms=parts, efficiency=efficiency)
        lines += launches_of(case, run="run2", env_hash=CPU, step_s=64 / rate)
        lines.append(result(case, rate, run="run2", env_hash=CPU, **fields))
    return lines


def write(path: Path, lines):
    """Write records as JSON Lines; return the path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
