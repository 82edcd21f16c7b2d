#!/usr/bin/env bash
# The operators' tests on a native layer built with AddressSanitizer and UBSan; arguments go to pytest.
# The build lies in a folder of its own, next to a copy of the Python sources: the checkout stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "${PYTHON:-python3}")
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cp -r distpro tests pyproject.toml "$build"
rm -f "$build"/distpro/_C.*

flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
cmake -GNinja -S . -B "$build/native" -DPython_EXECUTABLE="$python" -DDISTPRO_CUDA=OFF \
  -DCMAKE_BUILD_TYPE=Sanitized -DCMAKE_CXX_FLAGS_SANITIZED="$flags" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/distpro" >/dev/null
cmake --build "$build/native"

# Python itself is not instrumented: the runtimes come first, and its own leaks are not ours.
runtimes="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
cd "$build"
sanitized() {
  LD_PRELOAD="$runtimes" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    DISTPRO_NATIVE=1 OMP_NUM_THREADS=2 PYTHONPATH="$build" "$python" "$@"
}

# A pass must not mean that nothing was watched: a sum over memory that is too short has to be caught.
cat >overrun.py <<'END'
import torch
from distpro import _native

kernels, x, y = _native.native(), torch.ones(64), torch.ones(1, dtype=torch.float64)
plan = kernels.VectorPlan.dots(kernels.Dtype.float32, [65], [0], [0], 1, 1024)
kernels.pathway_dots(plan, [x.data_ptr()], [x.data_ptr()], y.data_ptr(), y.data_ptr(), None)
END
if sanitized overrun.py 2>overrun.log || ! grep -q "AddressSanitizer: heap-buffer-overflow" overrun.log; then
  echo "sanitize: a deliberate overrun was not caught" >&2
  exit 1
fi

sanitized -m pytest -q -p no:cacheprovider tests/test_native_ops.py tests/test_native_autograd.py \
  tests/test_ops.py -m "not slow" "$@"
