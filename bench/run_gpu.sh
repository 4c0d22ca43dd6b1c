#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in two calls of at most 7 minutes, for a GPU that is rented by the minute:
#
#   PART=1 bench/run_gpu.sh     the extension beside the compilation of tuning's candidates; the GPU tests; tuning; each figure that the GPU half is
#                               measured by, with plain torch and the floor beside it
#   PART=2 bench/run_gpu.sh     every suite at reference size, the table of 86 million entities, compute-sanitizer; PyKEEN is a
#                               rival of the suites where it is installed
#   DRY=1 PART=1 bench/run_gpu.sh   the same where there is no GPU: candidates are compiled, figures are of a CPU and small
#
# Either part stands alone. torch, Triton, pytest and nvcc are used as they come; nothing is installed and no network needed, and the checkout need
# not be installed. A step that fails or runs out of its time does not stop the others. At most eight files come to OUT, packed after every step; the
# summary is the end of the output. Exit code 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PART=${PART:-1}
DRY=${DRY:-0}
BUDGET=${BUDGET:-405}               # seconds for everything
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/gpu}")
if [ "$DRY" = 1 ]; then DEVICE=cpu SIZE=${SIZE:-small}; else DEVICE=cuda SIZE=${SIZE:-reference}; fi
# What matters most comes first: time may run out.
SUITES=${SUITES:-step ranking sampler hal corruption scoring epoch plain items}

mkdir -p "$OUT"
work=$(mktemp -d)
logs=$work/logs
mkdir -p "$logs" "$work/results"
links=()
trap 'rm -f "${links[@]}"; rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# A checkout that is not installed lacks the folders that the package maps into itself.
for folder in kernels csrc; do
  if ! "$PYTHON" -c "import dhns_fast.$folder" 2>/dev/null; then
    ln -s "../$folder" "dhns_fast/$folder" && links+=("dhns_fast/$folder")
  fi
done

summary=()
failed=0
left() { echo $((BUDGET - SECONDS)); }
note() { summary+=("$(printf '%-16s %-34s %4s s' "$1" "$2" "$3")"); }

# Two files a part, whatever a step wrote: one of logs and results, and the tuned table by itself.
pack() {
  tar czf "$OUT/part$PART.tar.gz" -C "$work" logs results 2>/dev/null
  for table in kernels/tuned/sm_*.json "$work"/results/*.jsonl; do [ -f "$table" ] && cp "$table" "$OUT/"; done
}

# step NAME SECONDS COMMAND...: runs the command with its output in a log.
step() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  if [ "$(left)" -lt 8 ]; then
    note "$name" "no time left" 0
    failed=1
    return
  fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  # An interrupt lets pytest write what it has.
  timeout -s INT -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "out of time after $limit s" $((SECONDS - begin)) ;;
    *) note "$name" "failed, exit code $code" $((SECONDS - begin)) ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  pack
}

# The end of a log, where the summary is short of room.
show() { [ -f "$logs/$1.log" ] && printf -- '--- %s\n%s\n' "$1" "$(tail -n "$2" "$logs/$1.log" | cut -c1-200)"; }


if [ "$PART" = 1 ]; then
  build() { "$PYTHON" -c 'from dhns_fast.ops import build; print(build.build()); print(build.status())'; }
  build >"$logs/build.log" 2>&1 &
  building=$!
  if [ "$DRY" = 1 ]; then
    step tune-compiles 300 "$PYTHON" bench/tune.py --dry
  else
    step tune 140 "$PYTHON" bench/tune.py --seconds 125
  fi
  wait "$building" && note build ok "" || { note build failed ""; failed=1; }
  if [ "$DRY" != 1 ]; then
    # The command line's parser may be missing on a bare machine.
    skip=()
    "$PYTHON" -c 'import jsonargparse' 2>/dev/null || skip=(--ignore=tests/test_cli.py --ignore=tests/test_bench.py)
    step hal-tests 60 "$PYTHON" -m pytest -p no:cacheprovider --durations=5 -m gpu tests/ops/test_hal_cuda.py
    step gpu-tests 70 "$PYTHON" -m pytest -p no:cacheprovider -m gpu --ignore=tests/ops/test_hal_cuda.py "${skip[@]}"
    step kernel-tests 40 "$PYTHON" -m pytest -p no:cacheprovider tests/kernels --ignore=tests/kernels/test_aot.py
    step rows 130 "$PYTHON" bench/gpu_rows.py "$work/results/rows.jsonl" --seconds 120
  else
    step kernel-tests 120 "$PYTHON" -m pytest -p no:cacheprovider tests/kernels/test_corruption_kernels.py
    step rows 60 "$PYTHON" bench/gpu_rows.py "$work/results/rows.jsonl" --seconds 30 --device cpu --small
  fi
else
  step headline 75 "$PYTHON" bench/gpu_rows.py "$work/results/headline.jsonl" --sections headline --seconds 60 \
    --device "$DEVICE" $([ "$DRY" = 1 ] && echo --small)
  reserve=0
  if [ "$DRY" != 1 ] && command -v compute-sanitizer >/dev/null; then reserve=100; fi
  BUDGET=$((BUDGET - reserve))
  if [ "$DRY" = 1 ]; then SUITES=hal; fi
  for suite in $SUITES; do
    [ -f "bench/bench_$suite.py" ] || continue
    step "$suite" 45 "$PYTHON" -m pytest -p no:cacheprovider "bench/bench_$suite.py" --benchmark --benchmark-device "$DEVICE" \
      --benchmark-size "$SIZE" "--benchmark-results=$work/results"
  done
  BUDGET=$((BUDGET + reserve))
  if [ "$reserve" -gt 0 ]; then
    for tool in memcheck racecheck; do
      # Our kernels only: torch's own are thousands, and not in question.
      step "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=hal_ --kernel-name \
        kernel_substring=distance_ "$PYTHON" -m pytest -x -m gpu tests/ops -k "(hal or score_cuda) and not compile"
    done
  fi
fi

pack
for log in build hal-tests gpu-tests kernel-tests memcheck racecheck; do show "$log" 12; done
for log in tune tune-compiles; do show "$log" 30; done
for log in $SUITES; do show "$log" 14; done
for log in headline rows; do show "$log" 45; done
echo
printf '%s\n' "${summary[@]}"
echo "part $PART, $DEVICE, $SECONDS s; files in $OUT:" "$(ls "$OUT" | tr '\n' ' ')"
exit $failed
