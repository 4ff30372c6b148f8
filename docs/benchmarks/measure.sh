#!/usr/bin/env bash
# Measures what the folder two_cores holds, a quarter of an hour on a machine that does nothing else, and writes its report.
set -euo pipefail
cd "$(dirname "$0")/../.."
records=docs/benchmarks/two_cores/records
common=(--workload=mnist_cnn --windows=12 --warmup_secs=6 --output="$records")

python -m benchmarks.run --mode=sweep --workers=1,2 --launches=5 "${common[@]}"
python -m benchmarks.run --mode=peers --launches=5 "${common[@]}"
python -m benchmarks.run --mode=comm --workers=2 --launches=3 --comm_bytes=1e4,1e5,1e6,1e7,4e7 "${common[@]}"
python -m benchmarks.run --mode=e2e --launches=3 --epochs=3 --nosplit "${common[@]}"
python -m benchmarks.run --mode=input --launches=3 "${common[@]}"
python -m benchmarks.run --mode=startup --launches=3 "${common[@]}"
python -m benchmarks.report "$records" --output=docs/benchmarks/two_cores
