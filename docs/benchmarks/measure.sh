#!/usr/bin/env bash
# Measures mnist_cnn in each mode, a quarter of an hour on a machine that does nothing else, and writes docs/benchmarks/two_cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
records=docs/benchmarks/two_cores/records
rm -rf docs/benchmarks/two_cores
common=(--workload=mnist_cnn --windows=10 --warmup_secs=3 --output="$records")

python -m benchmarks.run --mode=sweep --workers=1,2 --launches=3 "${common[@]}"
python -m benchmarks.run --mode=peers --launches=3 "${common[@]}"
python -m benchmarks.run --mode=comm --workers=2 --launches=2 --comm_bytes=1e5,1e6,1e7 "${common[@]}"
python -m benchmarks.run --mode=e2e --launches=2 --epochs=3 --nosplit "${common[@]}"
python -m benchmarks.run --mode=input --launches=2 "${common[@]}"
python -m benchmarks.run --mode=startup --launches=2 "${common[@]}"
python -m benchmarks.report "$records" --output=docs/benchmarks/two_cores
