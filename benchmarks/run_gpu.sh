#!/usr/bin/env bash
# Everything that needs a GPU, in one command and less than ten minutes: builds the checkout in place, runs the tests of
# the native layer, the sanitizer and all benchmarks, and writes the results to the folder OUT.
#
#     benchmarks/run_gpu.sh OUT
#
# Needs a Hopper GPU (DISTPRO_CUDA_ARCHS for another), nvcc, cmake, ninja, and a Python (PYTHON=...) with torch 2.11
# or newer, torchvision, timm (and so safetensors), pybind11, setuptools, pytest and pytest-benchmark. No network;
# nothing is installed.
# A part that fails or takes too long is noted in OUT/summary.txt and the next one runs; the exit status is then 1. After
# 570 seconds no part starts or continues, so that the summary is written within ten minutes.
set -uo pipefail
(($# == 1)) || { echo "usage: $0 OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export DISTPRO_NATIVE=1                               # the tests must not pass by way of the references
export DISTPRO_CUDA=ON
export DISTPRO_CUDA_ARCHS=${DISTPRO_CUDA_ARCHS:-90-real}  # one architecture builds in a third of the time
export PYTHONUNBUFFERED=1
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin       # nvcc, compute-sanitizer and ncu are there on bare images
summary=$out/summary.txt
failed=$(mktemp -u)
deadline=570
: >"$summary"
: >"$out/log.txt"

part() { # part NAME SECONDS COMMAND...: runs it for at most SECONDS, output to OUT/log.txt, one line to the summary
  local name=$1 seconds=$2 start status=0 said printed
  shift 2
  ((seconds <= deadline - SECONDS)) || seconds=$((deadline - SECONDS))
  ((seconds >= 5)) || { skip "$name" "no time is left"; : >"$failed"; return 1; }
  start=$(date +%s)
  printed=$(mktemp)
  # On SIGINT pytest writes what it has so far; bash makes background jobs ignore SIGINT, hence --default-signal.
  timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" </dev/null >"$printed" 2>&1 || status=$?
  { printf '\n== %s: %s\n' "$name" "$*"; cat "$printed"; } >>"$out/log.txt"
  said=$(grep -v '^\s*$' "$printed" | tail -n 1 | cut -c 1-150)
  case $status in
    0) said="passed: $said" ;;
    124 | 137) said="FAILED: stopped after $seconds s" ;;
    *) said="FAILED with $status: $said" ;;
  esac
  ((status == 0)) || : >"$failed"
  printf '%-12s %4d s  %s\n' "$name" "$(($(date +%s) - start))" "$said" | tee -a "$summary"
  rm -f "$printed"
  return $status
}

skip() { printf '%-12s %6s  skipped: %s\n' "$1" "" "$2" | tee -a "$summary"; }

pytest() { # pytest NAME SECONDS ARGUMENTS...
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" -m pytest -q -p no:cacheprovider "$@"
}

sanitizer() { # sanitizer TOOL SECONDS: without torch's caching allocator, in whose blocks every address is valid
  local run=("$python" -m pytest -q -p no:cacheprovider -x tests/test_cuda_ops.py)
  run+=(-k "(every_way or boundary) and not torch.float16")
  part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --report-api-errors no \
    --error-exitcode 9 "${run[@]}"
}

part device 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
# By hand if setup.py fails, for example because setuptools is older than pyproject.toml requires.
part build 150 bash -euc '"$0" setup.py build_ext --inplace || {
  cmake --fresh -GNinja -S . -B build/gpu -DPython_EXECUTABLE="$(command -v "$0")" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/distpro" -DDISTPRO_CUDA=ON -DDISTPRO_CUDA_ARCHS="$DISTPRO_CUDA_ARCHS"
  cmake --build build/gpu
}' "$python"
part environment 30 "$python" -m distpro.env
part registers 5 "$python" benchmarks/ptxas_report.py

# Only the tests that need a GPU, in files that need no other packages than those above. Nothing here is timed, so the
# sanitizer runs in parallel.
pytest tests 70 -vv tests/test_native.py tests/test_native_ops.py tests/test_native_autograd.py tests/test_ops.py \
  tests/test_cuda_ops.py tests/test_graphs.py tests/test_features.py -m "gpu and not slow" --junitxml="$out/tests.xml" &
if command -v compute-sanitizer >/dev/null; then
  sanitizer memcheck 120 &
  sanitizer racecheck 120 &
else
  skip memcheck "no compute-sanitizer"
  skip racecheck "no compute-sanitizer"
fi
wait

# First without torch.compile, which takes most of the time, so that these numbers exist in any case.
sizes=(--benchmark-only --cifar-batch 128 --imagenet-batch 128)
ops=(benchmarks/test_pathway_loss.py benchmarks/test_perturb.py "${sizes[@]}" --no-compile --rounds 10)
steps=(benchmarks/test_search_step.py benchmarks/test_distill_step.py "${sizes[@]}" --no-compile --rounds 7)
compiled=(benchmarks/test_pathway_loss.py -k fp32 "${sizes[@]}" --rounds 5)
pytest operators 100 "${ops[@]}" --benchmark-json="$out/benchmarks.json"
pytest steps 70 "${steps[@]}" --benchmark-json="$out/benchmarks-steps.json"
pytest resized 40 benchmarks/test_resized_conv.py "${sizes[@]}" --rounds 5 --benchmark-json="$out/benchmarks-resized.json"
pytest hours 160 benchmarks/test_gpu_hours.py "${sizes[@]}" --rounds 2 --all-pairs --benchmark-json="$out/benchmarks-hours.json"
pytest compiled 80 "${compiled[@]}" --benchmark-json="$out/benchmarks-compiled.json"
# Where each kernel's time goes, in log.txt; on many machines only administrators may read the counters.
if command -v ncu >/dev/null; then
  part ncu 60 bash -c 'ncu "$@" || echo "no counters: see log.txt"' ncu --set detailed --launch-skip 6 --launch-count 9 \
    --kernel-name 'regex:forward_kernel|backward_kernel|sums_kernel' "$python" -m pytest -q -p no:cacheprovider \
    benchmarks/test_pathway_loss.py -k "cifar and train" "${sizes[@]}" --no-compile --rounds 2
else
  skip ncu "no ncu"
fi

# One line per benchmark: its name, median, and the numbers in its extra_info.
"$python" - "$out"/benchmarks*.json >>"$summary" 2>&1 <<'PYTHON'
import json, os, sys

for path in filter(os.path.getsize, filter(os.path.exists, sys.argv[1:])):
    print(os.path.basename(path))
    for b in json.load(open(path))["benchmarks"]:
        facts = {k: v for k, v in b["extra_info"].items() if isinstance(v, (int, float))}
        extra = "  ".join(f"{k} {v:.4g}" for k, v in facts.items())
        print(f"  {b['name']:<60} {b['stats']['median'] * 1e6:10.1f} us  {extra}")
PYTHON

printf 'total %d s, %s\n' "$SECONDS" "$([[ -e $failed ]] && echo "something FAILED: see log.txt" || echo "all passed")" |
  tee -a "$summary"
[[ ! -e $failed ]]
