#!/usr/bin/env bash
# Measures distloop and its peers on four models, at one replica, two in one process, and two processes: an hour on a
# machine that does nothing else. Writes docs/benchmarks/speed.
set -euo pipefail
cd "$(dirname "$0")/../.."
measured=docs/benchmarks/speed
rm -rf "$measured"
common=(--mode=peers --launches=7 --windows=8 --warmup_secs=2 --output="$measured/records")
models=(
    "--workload=mnist_cnn --task_args=filters=8,strides=4,hidden=0"
    "--workload=mnist_cnn"
    "--workload=gpt2_124m --task_args=layers=2,width=64,heads=2,vocabulary=256,length=32,dropout=0 --batch=16"
    "--workload=dlrm_small --task_args=rows=2000,width=16,dense=64"
)
for model in "${models[@]}"; do
    read -ra model <<<"$model"
    python -m benchmarks.run "${common[@]}" "${model[@]}" --peers=distloop,loop_in_graph,fit_many,orbit
    python -m benchmarks.run "${common[@]}" "${model[@]}" --peers=distloop,loop_in_graph,fit,orbit --replicas=2
    python -m benchmarks.run "${common[@]}" "${model[@]}" --peers=distloop,loop_in_graph,orbit --workers=2
done
python -m benchmarks.report "$measured/records" --output="$measured"
