#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one call of at most 9 minutes: builds the extension, runs the GPU tests, every suite of
# bench/, and compute-sanitizer on the C++ kernels.
#
#   bench/run_gpu.sh                        # torch, Triton, pytest and nvcc as they come; nothing is installed and no network needed
#   DEVICE=cpu SIZE=small BUDGET=60 bench/run_gpu.sh
#
# Results are JSON files in RESULTS; with OUT set to a folder, they and the logs are packed into OUT/results.tar.gz after every step, for machines
# from which only few files come back. What was done for the same sources is not done again: unpack the archive into RESULTS and call it again.
# A step that fails or runs out of its time does not stop the others. Exit code 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

DEVICE=${DEVICE:-cuda}              # cuda, or cpu to try this script out
SIZE=${SIZE:-reference}             # small, reference, large
BUDGET=${BUDGET:-525}               # seconds for everything
LIMIT=${LIMIT:-75}                  # seconds for one suite
PYTHON=${PYTHON:-python3}
RESULTS=$(realpath -m "${RESULTS:-bench/results}")
# What matters most comes first: time may run out.
SUITES=${SUITES:-sampler hal scoring ranking corruption epoch $(for f in bench/bench_*.py; do f=${f#bench/bench_}; echo "${f%.py}"; done)}

logs=$RESULTS/logs
mkdir -p "$logs"
links=()
trap 'rm -f "${links[@]}"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# A checkout that is not installed lacks the folders that the package maps into itself.
for folder in kernels csrc; do
  if ! "$PYTHON" -c "import dhns_fast.$folder" 2>/dev/null; then
    ln -s "../$folder" "dhns_fast/$folder" && links+=("dhns_fast/$folder")
  fi
done
sources=$("$PYTHON" -c 'import sys; sys.path.insert(0, "bench"); import harness; print(harness.sources())') || exit 1

summary=()
failed=0
left() { echo $((BUDGET - SECONDS)); }

pack() { if [ -n "${OUT:-}" ]; then (cd "$RESULTS" && tar czf "$OUT/results.tar.gz" -- *.json logs 2>/dev/null); fi; }

note() { summary+=("$(printf '%-20s %-34s %4s s' "$1" "$2" "$3")"); }

# step NAME SECONDS FILE COMMAND...: runs the command with its output in a log; FILE holds the digest of the sources when it was done before.
step() {
  local name=$1 limit=$2 file=$3 begin=$SECONDS code
  shift 3
  if grep -qs "\"sources\": \"$sources\"" "$file" && ! grep -qs '"complete": false' "$file"; then
    note "$name" "done before" 0
    return
  fi
  if [ "$(left)" -lt 10 ]; then
    note "$name" "no time left" 0
    failed=1
    return
  fi
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  echo "=== $name (at most $limit s)"
  # An interrupt lets pytest write what it has.
  timeout -s INT -k 15 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  tail -n 40 "$logs/$name.log"
  case $code in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "out of time after $limit s" $((SECONDS - begin)) ;;
    *) note "$name" "failed, exit code $code" $((SECONDS - begin)) ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  # Logs of tests take the place of a results file.
  [ "$code" -eq 0 ] && [ "$file" = "$logs/$name.log" ] && echo "\"sources\": \"$sources\"" >>"$file"
  pack
}

step build 120 "$logs/build.log" "$PYTHON" -c 'from dhns_fast.ops import build; print(build.build(verbose=True)); print(build.status())'

if [ "$DEVICE" = cuda ]; then
  # The command line's parser may be missing on a bare machine.
  skip=()
  "$PYTHON" -c 'import jsonargparse' 2>/dev/null || skip=(--ignore=tests/test_cli.py --ignore=tests/test_bench.py)
  step gpu-tests 100 "$logs/gpu-tests.log" "$PYTHON" -m pytest -m gpu "${skip[@]}"
  step kernel-tests 60 "$logs/kernel-tests.log" "$PYTHON" -m pytest tests/kernels --ignore=tests/kernels/test_aot.py
fi

reserve=0
if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then reserve=60; fi
BUDGET=$((BUDGET - reserve))
seen=" "
for suite in $SUITES; do
  # Named first and found again, or named and not there.
  if [[ $seen == *" $suite "* ]] || [ ! -f "bench/bench_$suite.py" ]; then continue; fi
  seen+="$suite "
  step "$suite" "$LIMIT" "$RESULTS/$suite-$DEVICE-$SIZE.json" "$PYTHON" -m pytest "bench/bench_$suite.py" \
    --benchmark --benchmark-device "$DEVICE" --benchmark-size "$SIZE" "--benchmark-results=$RESULTS"
done
BUDGET=$((BUDGET + reserve))

if [ "$reserve" -gt 0 ]; then
  for tool in memcheck racecheck; do
    # Our kernels only: torch's own are thousands, and not in question.
    step "$tool" 60 "$logs/$tool.log" compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=hal_ \
      "$PYTHON" -m pytest -x -m gpu tests/ops -k "hal and not compile"
  done
fi

pack
echo
echo "sources $sources, $DEVICE, $SIZE, $SECONDS s; results in $RESULTS"
printf '%s\n' "${summary[@]}"
exit $failed
