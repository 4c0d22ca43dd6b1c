#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in two calls of at most 7 minutes, for a GPU that is rented by the minute:
#
#   PART=1 bench/run_gpu.sh     the extension beside the compilation of tuning's candidates; tuning; the GPU tests; each figure that the GPU half is
#                               measured by, with plain torch and the floor beside it
#   PART=2 bench/run_gpu.sh     the table of 86 million entities, compute-sanitizer, every suite at reference size; PyKEEN is a
#                               rival of the suites where it is installed
#   DRY=1 PART=1 bench/run_gpu.sh   the same where there is no GPU: a few candidates are compiled, figures are of a CPU and small
#
# Either part stands alone, and begins by saying what each of its steps may take. torch, Triton, pytest and nvcc are used as they come; nothing is
# installed and no network needed, and the checkout need not be installed. A step that fails or runs out of its time does not stop the others, nor
# takes of theirs. At most eight files come to OUT, packed after every step; the summary is the end of the output. Exit code 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PART=${PART:-1}
DRY=${DRY:-0}
PATIENCE=${PATIENCE:-1}             # multiplies all times, for a machine that is slow or shared
BUDGET=${BUDGET:-$((405 * PATIENCE))}  # seconds for everything
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-bench/results/gpu}")
if [ "$DRY" = 1 ]; then DEVICE=cpu SIZE=${SIZE:-small}; else DEVICE=cuda SIZE=${SIZE:-reference}; fi

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

# plan NAME SECONDS ...: what each step may take at most. Together they fit into the budget: none can eat another's time.
declare -A limits
plan() {
  local total=0
  echo "part $PART on $DEVICE, at most:"
  while [ $# -gt 0 ]; do
    limits[$1]=$(($2 * PATIENCE))
    total=$((total + limits[$1]))
    printf '  %-16s %4s s\n' "$1" "${limits[$1]}"
    shift 2
  done
  printf '  %-16s %4s s of %s\n' together "$total" "$BUDGET"
  [ "$total" -le "$BUDGET" ] || { echo "the plan does not fit into BUDGET=$BUDGET s"; exit 2; }
}

# step NAME COMMAND...: runs the command with its output in a log, for as long as the plan says.
step() {
  local name=$1 begin=$SECONDS code limit
  limit=${limits[$name]}
  shift
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 3 ]; then
    note "$name" "no time left" 0
    failed=1
    return
  fi
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


# Kernels are compiled by every core and timed by one: pytest-xdist, where it is, lets tests compile beside each other.
spread=()
"$PYTHON" -c 'import xdist' 2>/dev/null && [ "$DRY" != 1 ] && spread=(-n 6 --dist worksteal)
# The command line's parser may be missing on a bare machine.
skip=()
"$PYTHON" -c 'import jsonargparse' 2>/dev/null || skip=(--ignore=tests/test_cli.py --ignore=tests/test_bench.py)
pytest() { step "$1" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:2}"; }
suite() {
  pytest "$1" "bench/bench_$1.py" --benchmark --benchmark-device "$DEVICE" --benchmark-size "$SIZE" "--benchmark-results=$work/results" "${@:2}"
}

if [ "$PART" = 1 ] && [ "$DRY" = 1 ]; then
  plan tune-compiles 130 build 60 kernel-tests 60 graph-tests 70 rows 60
  step tune-compiles "$PYTHON" bench/tune.py --dry --widths 256 --first 1
  step build "$PYTHON" -c 'from dhns_fast.ops import build; print(build.why_not("cpu") or build.status())'
  # Not the kernels: Triton 3.6's interpreter and NumPy from 2.4 on do not go together.
  pytest kernel-tests tests/kernels/test_tuned.py
  pytest graph-tests tests/train/test_graphed.py -k "asks or named or distinct"
  step rows "$PYTHON" bench/gpu_rows.py "$work/results/rows.jsonl" --seconds $((40 * PATIENCE)) --device cpu --small
elif [ "$PART" = 1 ]; then
  plan tune 120 build 45 gpu-tests 75 kernel-tests 25 rows 125
  build() { "$PYTHON" -c 'from dhns_fast.ops import build; print(build.build()); print(build.status())'; }
  # nvcc has its minute beside Triton's compilers.
  build >"$logs/build-beside.log" 2>&1 &
  building=$!
  step tune "$PYTHON" bench/tune.py --seconds 105 --widths 256 1024
  step build "$PYTHON" -c 'from dhns_fast.ops import build; print(build.build()); print(build.status())'  # waits for the one beside
  kill "$building" 2>/dev/null
  pytest gpu-tests --durations=8 -m gpu "${spread[@]}" "${skip[@]}" tests
  pytest kernel-tests "${spread[@]}" tests/kernels --ignore=tests/kernels/test_aot.py
  step rows "$PYTHON" bench/gpu_rows.py "$work/results/rows.jsonl" --seconds 112
elif [ "$DRY" = 1 ]; then
  plan headline 40 optimiser 60
  step headline "$PYTHON" bench/gpu_rows.py "$work/results/headline.jsonl" --sections headline --seconds 30 --device cpu --small
  suite optimiser
else
  # What matters most comes first; every suite ends by itself where it has measured everything.
  plan build 100 headline 70 memcheck 35 racecheck 35 step 35 ranking 30 sampler 30 hal 20 corruption 15 scoring 15 epoch 15
  step build "$PYTHON" -c 'from dhns_fast.ops import build; print(build.build()); print(build.status())'
  step headline "$PYTHON" bench/gpu_rows.py "$work/results/headline.jsonl" --sections headline --seconds 60
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      # Our kernels only: torch's own are thousands, and not in question.
      step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=hal_ --kernel-name \
        kernel_substring=distance_ "$PYTHON" -m pytest -x -m gpu tests/ops -k "(hal or score_cuda) and not compile and not a_graph_and"
    done
  else
    note sanitizer "compute-sanitizer is not here" 0
  fi
  for name in step ranking sampler; do suite "$name"; done
  # Compiling the rival takes longer than either may.
  for name in hal corruption; do suite "$name" --benchmark-without torch.compile; done
  for name in scoring epoch; do suite "$name"; done
fi

pack
# The last 12 000 characters are what a reply may be cut to.
{
  for log in build gpu-tests kernel-tests graph-tests memcheck racecheck; do show "$log" 10; done
  for log in tune tune-compiles; do show "$log" 24; done
  for log in step ranking sampler hal corruption scoring epoch optimiser; do show "$log" 10; done
  for log in headline rows; do show "$log" 40; done
} | tail -c 10500
echo
printf '%s\n' "${summary[@]}"
echo "part $PART, $DEVICE, $SECONDS s; files in $OUT:" "$(cd "$OUT" && ls -s --block-size=1K | tail -n +2 | awk '{printf "%s (%s K) ", $2, $1}')"
exit $failed
