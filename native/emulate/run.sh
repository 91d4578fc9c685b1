#!/bin/sh
# Tests of the tiers that this machine cannot execute (docs/isa.md). Needs g++; for AVX-512 on a
# machine without it libsimde-dev; for Arm g++-aarch64-linux-gnu and qemu-user.
# What is missing is skipped, with a line saying so. Leaves with 1 if a product differs.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 1
flags="-std=c++20 -O2 -fno-math-errno -ffp-contract=off -w -Wno-psabi -Inative -Inative/include"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
failed=0

# check NAME TABLE COMPILER RUNNER TIER_FLAGS TIER_SOURCES...
# Single products, and whole steps of small models (so everything but the Python module compiles).
check() {
  name=$1 table=$2 compiler=$3 runner=$4 tier_flags=$5
  shift 5
  objects="$work/$compiler-generic.o"
  [ -e "$objects" ] || $compiler $flags -c native/tiers/generic.cpp -o "$objects" || return 1
  for source in "$@"; do
    $compiler $flags $tier_flags -c "native/tiers/$source.cpp" -o "$work/$name-$source.o" || return 1
    objects="$objects $work/$name-$source.o"
  done
  result=0
  for program in check step_check; do
    $compiler $flags -static -pthread -DEARNEST_TIER="$table" "native/emulate/$program.cpp" \
      native/core/codecs.cpp native/core/threadpool.cpp native/model/*.cpp $objects \
      -o "$work/$name-$program" && $runner "$work/$name-$program" || result=1
  done
  return $result
}

has() { command -v "$1" > /dev/null 2>&1; }

machine=$(uname -m)
if [ "$machine" = x86_64 ]; then
  if grep -q avx512_vnni /proc/cpuinfo; then
    check amx kAmx g++ "" "$avx512 -mavx512bf16 -DEARNEST_AMX_MODEL=1" avx512vnni amx || failed=1
  else
    echo "skipped: amx with modelled tiles needs AVX-512 VNNI for the rest of the tier"
  fi
  check avxvnni kAvxVnni g++ "" "$avx2 -DEARNEST_VNNI_MODEL=1" avxvnni || failed=1
  if [ -e /usr/include/simde/x86/avx512.h ]; then
    check avx512vnni kAvx512Vnni g++ "" "$avx2 -DEARNEST_SIMDE=1" avx512vnni || failed=1
  else
    echo "skipped: avx512vnni under SIMDe (apt install libsimde-dev)"
  fi
fi
if has aarch64-linux-gnu-g++ && has qemu-aarch64; then
  arm=aarch64-linux-gnu-g++
  check neon kNeonDotprod $arm "qemu-aarch64 -cpu max" "-march=armv8.2-a+dotprod" neon_dotprod || failed=1
  check i8mm kI8mm $arm "qemu-aarch64 -cpu max" \
    "-march=armv8.2-a+dotprod+i8mm" neon_dotprod i8mm || failed=1
else
  echo "skipped: Arm (apt install g++-aarch64-linux-gnu qemu-user)"
fi
exit $failed
