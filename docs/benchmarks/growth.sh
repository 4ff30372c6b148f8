#!/usr/bin/env bash
# Measures how a step grows with weights, replicas, steps a call and batch: a quarter of an hour on a machine that does
# nothing else. Writes docs/benchmarks/growth.
set -euo pipefail
cd "$(dirname "$0")/../.."
measured=docs/benchmarks/growth
rm -rf "$measured"
common=(--mode=step --nosplit --launches=3 --windows=8 --warmup_secs=2 --output="$measured/records")
tiny=(--workload=mnist_cnn "--task_args=filters=8,strides=4,hidden=0")
for bytes in 400000 4000000 40000000 400000000; do
    python -m benchmarks.run "${common[@]}" --workload=null --task_args="gradient_bytes=$bytes" --replicas=1,2
done
python -m benchmarks.run "${common[@]}" "${tiny[@]}" --mode=sweep --replicas=1,2,4,8
for steps in 1 4 16 64 256; do
    python -m benchmarks.run "${common[@]}" "${tiny[@]}" --steps_per_call="$steps"
done
for batch in 8 32 128 512; do
    python -m benchmarks.run "${common[@]}" "${tiny[@]}" --batch="$batch" --replicas=1,2
done
python -m benchmarks.report "$measured/records" --output="$measured"
