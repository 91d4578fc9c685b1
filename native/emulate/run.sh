#!/bin/sh
# Tests of the tiers that few machines can execute (docs/isa.md). Needs g++; for avx512vnni
# libsimde-dev; for Arm g++-aarch64-linux-gnu and qemu-user.
# What is missing is skipped, with a line saying so. Leaves with 1 if a product differs.
# -O1: most of the time is the compiler's, and the models of instructions are loops anyway.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 1
flags="-std=c++20 -O1 -fno-math-errno -ffp-contract=off -w -Wno-psabi -Inative -Inative/include"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"

# check TABLE COMPILER RUNNER TIER_FLAGS TIER_SOURCES...
# Single products, and whole steps of small models (so everything but the Python module compiles).
check() {
  table=$1 compiler=$2 runner=$3 tier_flags=$4
  shift 4
  base="generic" sources=""
  for source in native/core/codecs.cpp native/core/threadpool.cpp native/model/*.cpp; do
    base="$base $(basename "$source" .cpp)" sources="$sources $source"
  done
  if ! [ -e "$work/$compiler/generic.o" ]; then
    mkdir -p "$work/$compiler"
    for source in native/tiers/generic.cpp $sources; do
      $compiler $flags -c "$source" -o "$work/$compiler/$(basename "$source" .cpp).o" || return 1
    done
  fi
  objects=""
  for source in "$@"; do
    [ -e "$work/$compiler/$source.o" ] || $compiler $flags $tier_flags \
      -c "native/tiers/$source.cpp" -o "$work/$compiler/$source.o" || return 1
  done
  for name in $base "$@"; do objects="$objects $work/$compiler/$name.o"; done
  result=0
  for program in check step_check; do
    $compiler $flags -static -pthread -DEARNEST_TIER="$table" "native/emulate/$program.cpp" \
      $objects -o "$work/$table-$program" && $runner "$work/$table-$program" || result=1
  done
  return $result
}

has() { command -v "$1" > /dev/null 2>&1; }

x86() {
  failed=0
  if grep -q avx512f /proc/cpuinfo; then
    # What a tier leaves to avx512vnni is not its own: the generic tier stands in.
    lent="-DkAvx512Vnni=kGeneric -DkAvx512VnniStep=kGenericStep"
    check kAmx g++ "" "$avx512 -mavx512bf16 -DEARNEST_AMX_MODEL=1 $lent" amx || failed=1
    check kAvx512Bf16 g++ "" "$avx512 -DEARNEST_BF16_MODEL=1 $lent" avx512bf16 || failed=1
  else
    echo "skipped: amx and avx512bf16, modelled, need AVX-512 for the rest of the tier"
  fi
  check kAvxVnni g++ "" "$avx2 -DEARNEST_VNNI_MODEL=1" avxvnni || failed=1
  # Where the machine executes it, tests/native does so, too; this keeps the emulation alive.
  if [ -e /usr/include/simde/x86/avx512.h ]; then
    check kAvx512Vnni g++ "" "$avx2 -DEARNEST_SIMDE=1" avx512vnni || failed=1
  else
    echo "skipped: avx512vnni under SIMDe (apt install libsimde-dev)"
  fi
  return $failed
}

arm() {
  failed=0 arm=aarch64-linux-gnu-g++ qemu="qemu-aarch64 -cpu max"
  if has $arm && has qemu-aarch64; then
    check kNeonDotprod $arm "$qemu" "-march=armv8.2-a+dotprod" neon_dotprod || failed=1
    check kI8mm $arm "$qemu" "-march=armv8.2-a+dotprod+i8mm" neon_dotprod i8mm || failed=1
  else
    echo "skipped: Arm (apt install g++-aarch64-linux-gnu qemu-user)"
  fi
  return $failed
}

failed=0
arm > "$work/arm.log" 2>&1 &
other=$!
if [ "$(uname -m)" = x86_64 ]; then
  if has g++; then x86 || failed=1; else echo "skipped: emulated x86 tiers (apt install g++)"; fi
fi
wait $other || failed=1
cat "$work/arm.log"
exit $failed
