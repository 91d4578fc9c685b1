#!/bin/sh
# The native tests under sanitizers: AddressSanitizer with UndefinedBehaviorSanitizer, then
# ThreadSanitizer. Builds the module with each into build/sanitize-*, with few tiers (instrumented
# kernels take minutes to compile), and runs the Python tests that reach the C++ code.
#
#     PYTHON=python3 tools/sanitize.sh [address] [thread]
#
# EARNEST_TIERS="avx2;avx512vnni" compiles other tiers than these, beside generic. Needs g++, CMake
# and nanobind, and what the tests need; where something is missing it says so and leaves with 0.
set -u
cd "$(dirname "$0")/.." || exit 1
python=$(command -v "${PYTHON:-python3}") || exit 1
failed=0

has() { command -v "$1" > /dev/null 2>&1; }
for tool in g++ cmake; do
  has $tool || { echo "skipped: sanitizers ($tool is missing)"; exit 0; }
done
"$python" -c "import nanobind, numpy, pytest" 2> /dev/null ||
  { echo "skipped: sanitizers (python package nanobind or pytest is missing)"; exit 0; }

# build NAME SANITIZERS TIERS: leaves an importable copy of the package in build/sanitize-NAME/site
build() {
  folder=build/sanitize-$1
  generator=$(has ninja && echo Ninja || echo "Unix Makefiles")
  cmake -S . -B "$folder" -G "$generator" -DCMAKE_CXX_COMPILER=g++ -DPython_EXECUTABLE="$python" \
    -DCMAKE_CXX_COMPILER_LAUNCHER="$(command -v ccache)" \
    -DEARNEST_SANITIZE="$2" -DEARNEST_TIERS="$3" > "$folder.log" 2>&1 &&
    cmake --build "$folder" -j 2 >> "$folder.log" 2>&1 || { tail -20 "$folder.log"; return 1; }
  rm -rf "$folder/site"
  mkdir -p "$folder/site/earnest"
  for part in src/earnest/*; do
    case $part in *.so | *__pycache__) ;; *) ln -s "$PWD/$part" "$folder/site/earnest/" ;; esac
  done
  cp "$folder"/_native*.so "$folder/site/earnest/"
}

# check NAME LIBRARY TESTS...: runs pytest with the sanitizer's library in front of everything
check() {
  name=$1 library=$2 site=$PWD/build/sanitize-$1/site
  shift 2
  found=$(PYTHONPATH="$site" "$python" -c "
import importlib.util
print(importlib.util.find_spec('earnest._native').origin)")
  case $found in
    "$site"/*) ;;
    *) echo "python imports $found, which has no sanitizer: pip uninstall earnest"; return 1 ;;
  esac
  PYTHONPATH="$site" PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1:report_signal_unsafe=0:suppressions=$PWD/build/sanitize.suppressions" \
    LD_PRELOAD="$(g++ -print-file-name="$library") $(g++ -print-file-name=libstdc++.so.6)" \
    setarch -R "$python" -m pytest -q --capture=sys -p no:cacheprovider --no-header -o addopts="" "$@"
}

run() {
  begun=$(date +%s)
  build "$1" "$2" "$4" && built=$(date +%s) && shift 2 && library=$1 && shift 2 &&
    check "$name" "$library" "$@" || { failed=1; echo "sanitizer $name: FAILED"; return; }
  echo "sanitizer $name: passed; build $((built - begun)) s, tests $(($(date +%s) - built)) s"
}

mkdir -p build
# A thread-local of a module that was loaded later is freed inside the C library when its thread ends,
# which the sanitizer does not see to come after the thread's last use of it.
echo "race:dl_deallocate_tls" > build/sanitize.suppressions
for name in ${*:-address thread}; do
  case $name in
    address)  # (which makes mlock do nothing)
      run address address,undefined libasan.so "${EARNEST_TIERS:-avx2;neon_dotprod}" \
        tests/native tests/runners/test_native_step.py tests/runners/test_native_attention.py \
        tests/runners/test_native_packing.py -k "not lock" ;;
    thread)  # (which cannot follow threads into a forked child, and is too slow for signals)
      run thread thread libtsan.so "${EARNEST_TIERS:-none}" \
        tests/native/test_thread_pool.py tests/runners/test_native_step.py \
        -k "not child and not every_codec and not ctrl_c" ;;
    *) echo "not a sanitizer: $name"; exit 2 ;;
  esac
done
exit $failed
