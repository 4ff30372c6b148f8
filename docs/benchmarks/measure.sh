#!/usr/bin/env bash
# Measures mnist_cnn in each mode, half an hour on a machine that does nothing else, and writes docs/benchmarks/two_cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
measured=docs/benchmarks/two_cores
rm -rf "$measured"
common=(--workload=mnist_cnn --windows=10 --warmup_secs=3)
records=("${common[@]}" --output="$measured/records")

python -m benchmarks.run --mode=sweep --workers=1,2 --launches=5 "${records[@]}"
python -m benchmarks.run --mode=peers --launches=5 "${records[@]}"
python -m benchmarks.run --mode=comm --workers=2 --launches=2 --comm_bytes=1e5,1e6,1e7 "${records[@]}"
python -m benchmarks.run --mode=e2e --launches=2 --epochs=3 --nosplit "${records[@]}"
python -m benchmarks.run --mode=input --launches=2 "${records[@]}"
python -m benchmarks.run --mode=startup --launches=3 "${records[@]}"
python -m benchmarks.report "$measured/records" --output="$measured"

# What this machine cannot tell apart. It has no place in the report, whose cases are each measured once.
python -m benchmarks.run --mode=step --nosplit --launches=10 "${common[@]}" --output="$measured/equal"
python -m benchmarks.compare --aa --tolerance=0.5 "$measured/equal"
