#!/usr/bin/env bash
# Everything that only a GPU shows, in under ten minutes on one H100: one JSON a section, written as
# it goes, so that a run that is cut short is still of use. Needs dylora's core dependencies alone,
# but for the training runs of loop.py, which need datasets and say so where it is missing.
#
#   bash experiments/gpu/run.sh [FOLDER]                       # experiments/results/gpu by default
#   DEVICE=cpu DTYPE=float32 TOY=1 bash experiments/gpu/run.sh FOLDER    # the same at toy sizes
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-experiments/results/gpu}
device=${DEVICE:-cuda}
dtype=${DTYPE:-bfloat16}
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

if [ -n "${TOY:-}" ]; then
  loop="--layers 1 --length 128 --steps 3 --cases eager recomputed" budget=3600
  layers=1 wide_tokens=16 tokens=32 wide_experts="2" rounds=1 compile="" steps=3 limit=600
  small_case="E=4" sparse_case="E=8, T=16" width=64 sparse_tokens=16 sparse_experts=8
else
  loop="--layers 18 --plain" budget=${BUDGET:-580}
  layers=18 wide_tokens=2048 tokens=1024 wide_experts="8 4 64" rounds=9 compile="--compile" steps=200
  small_case="hidden 512" sparse_case="" width=2048
  sparse_tokens="2048 8192 32768" sparse_experts="16 64 256 512" limit=${LIMIT:-150}
fi
bench="$python experiments/speed/benchmark.py --device $device --dtype $dtype --layers $layers
  --rounds $rounds"
failed=0

section() { # section NAME SECONDS COMMAND…
  local name=$1 seconds=$2 started=$SECONDS left=$((budget - SECONDS))
  shift 2
  if [ $left -lt 5 ]; then
    echo "== $name: left out, as the time is up"
    return
  fi
  [ "$seconds" -lt $left ] || seconds=$left
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || failed=1
  echo "== $name: exit $code after $((SECONDS - started)) s"
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}

section correctness "$limit" "$python" experiments/gpu/correctness.py --device "$device" \
  --out "$out/correctness.json"
section loop "$limit" "$python" experiments/gpu/loop.py --device "$device" --dtype "$dtype" \
  $loop --out "$out/loop.json"
section sparse "$limit" $bench --section sparse --case "$sparse_case" --out "$out/sparse.json"
section sparse_wide "$limit" $bench --section sparse --width $width --sparse_tokens $sparse_tokens \
  --sparse_experts $sparse_experts --out "$out/sparse_wide.json"
section launches "$limit" "$python" experiments/gpu/launches.py --device "$device" --dtype "$dtype" \
  --layers $layers --tokens $wide_tokens --out "$out/launches.json"
section steps "$limit" $bench --section steps --fast --case codegemma \
  --wide_experts $wide_experts --wide_tokens $wide_tokens --out "$out/steps.json"
section decode "$limit" $bench --section decode --case codegemma --out "$out/decode.json"
section training "$limit" "$python" experiments/gpu/training.py --device "$device" --dtype "$dtype" \
  --steps "$steps" --out "$out/training.json"
section memory "$limit" $bench --section memory --out "$out/memory.json"
section small "$limit" $bench --section steps --fast --case "$small_case" --tokens $tokens \
  --out "$out/steps_small.json"
section projections "$limit" $bench --section projections --out "$out/projections.json"
[ -z "$compile" ] || section compiled "$limit" $bench --section steps --fast --compile \
  --wide_experts 8 --wide_tokens $wide_tokens --case "codegemma" --out "$out/compiled.json"
[ -z "$compile" ] || section decode_small "$limit" $bench --section decode --case "hidden 512" \
  --out "$out/decode_small.json"
[ -z "$compile" ] || section loop_compiled "$limit" "$python" experiments/gpu/loop.py \
  --device "$device" --dtype "$dtype" --layers 4 --cases eager compiled "float32, tf32, compiled" \
  --out "$out/loop_compiled.json"
exit $failed
