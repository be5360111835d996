#!/usr/bin/env bash
# On a machine with a CUDA device: the GPU tests, then the benchmarks, then their figures under bench/results/<device>/.
# From the repository's root, in an environment where xdfast is installed (PYTHON names its interpreter):
#
#   bash bench/gpu.sh
#
# The tests' failure does not keep the benchmarks from running; the exit status tells of both.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONSAFEPATH=1
PYTHON="${PYTHON:-python3}"
BIN="$(dirname "$(command -v "$PYTHON")")"
pytest() { if [[ -x "$BIN/pytest" ]]; then "$BIN/pytest" "$@"; else "$PYTHON" -P -m pytest "$@"; fi; }

device="$("$PYTHON" - <<'PYTHON'
import re, sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh needs a CUDA device; torch {torch.__version__} sees none")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
PYTHON
)" || exit 1
results="bench/results/$device"
mkdir -p "$results"
echo "=== $device: tests"
pytest -m gpu -q 2>&1 | tee "$results/tests.txt"
tests="${PIPESTATUS[0]}"
echo "=== $device: benchmarks"
pytest bench/bench_rsd.py -m gpu -k cuda --benchmark-only --benchmark-json="$results/rsd.json" -q
benchmarks="$?"
pytest bench/bench_cache.py -m gpu -k cuda --benchmark-only --benchmark-json="$results/cache.json" -q
benchmarks="$((benchmarks + $?))"
pytest bench/bench_policy.py -m gpu -k cuda --benchmark-only --benchmark-json="$results/policy.json" -q
benchmarks="$((benchmarks + $?))"
# Written after every case: what was measured stays if the run is cut off.
"$PYTHON" -P -c 'import sys; from xdfast.cli import main; sys.exit(main())' bench routed --device cuda --out "$results/routed.json"
benchmarks="$((benchmarks + $?))"
echo "tests: $tests, benchmarks: $benchmarks; figures in $results"
[[ "$tests" = 0 && "$benchmarks" = 0 ]]
