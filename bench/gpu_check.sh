#!/usr/bin/env bash
# Everything that needs a GPU, on one machine with a CUDA build of torch and a CUDA toolkit:
#
#   bench/gpu_check.sh [options] FOLDER [step ...]
#
# builds in place for the GPU that is there, runs the steps (default: all of them), writes what they
# found into FOLDER, and prints a table of PASS and FAIL last. A step that fails does not stop the
# others; the exit code is 1 if any failed. It is made for ten minutes
# on 16 cores and stops then (--seconds); no GPU has shown yet how long it takes. No network is used.
#
#   --python PYTHON   the interpreter with torch (default: python3)
#   --seconds N       time for everything (default: 570); steps that no time is left for fail
#   --rehearse        without a GPU: builds, and runs on the CPU what can run there
#   --dry-run         only print what would run
#
# Steps, in order; those in brackets run at the same time:
#
#   facts         device, versions, packages
#   build         the libraries, in place
#   [ kernels     registers, spills, vector loads of the machine code
#     tests       the whole suite on the GPU
#     repeats graphs streams sizes            parts of tests/cuda/test_cuda.py
#     memcheck racecheck initcheck synccheck  bench/exercise.py under compute-sanitizer
#     warmup ]    what torch.compile needs for the benchmark, compiled ahead
#   large         tensors around 2^31 elements
#   benchmark     python -m bench, alone on the machine
#   profile       ncu on some kernels, where it can read the counters
#
# FOLDER gets summary.txt, results.json (facts and steps), log.txt (all output of all steps),
# kernels.txt, benchmark.{json,md,png} and profile.csv. A Python package that is missing can be put
# on PYTHONPATH; tests that need one are left out, and log.txt says which.
set -uo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

fail() {
  echo "gpu_check: $*" >&2
  exit 2
}

python=python3 limit='' rehearse='' dry=''
while [[ ${1:-} == -* ]]; do
  case $1 in
    --python) python=${2:?--python needs an interpreter} && shift ;;
    --seconds) limit=${2:?--seconds needs a number} && shift ;;
    --rehearse) rehearse=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown option $1 (--help lists them)" ;;
  esac
  shift
done
[ $# -ge 1 ] || fail "name a folder for the results (--help says more)"
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
# The interpreter itself and not a script in front of it: compute-sanitizer follows no children.
python=$("$python" -c 'import sys; print(sys.executable)') || fail "cannot run the interpreter"

steps=(facts build kernels tests repeats graphs streams sizes memcheck racecheck initcheck synccheck
  warmup large benchmark profile)
together=(kernels tests repeats graphs streams sizes memcheck racecheck initcheck synccheck warmup)
# Seconds that each may take.
declare -A most=([facts]=60 [build]=240 [kernels]=90 [tests]=270 [repeats]=120 [graphs]=120
  [streams]=120 [sizes]=180 [memcheck]=240 [racecheck]=240 [initcheck]=240 [synccheck]=240
  [warmup]=270 [large]=150 [benchmark]=240 [profile]=120)
wanted=("${@:-${steps[@]}}")
for step in "${wanted[@]}"; do
  [ -n "${most[$step]:-}" ] || fail "there is no step $step (--help lists them)"
done

device=cuda
[ -n "$limit" ] || limit=570
if [ -n "$rehearse" ]; then  # not in a hurry
  device=cpu limit=$((limit * 5))
  for step in "${steps[@]}"; do most[$step]=$((most[$step] * 5)); done
fi
cores=$(nproc)
work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 MAX_JOBS="$cores"
export python out device cores rehearse dry work

# --- the steps: each a function that runs in a shell of its own ----------------------------------

say_and_run() {
  echo "+ $*"
  [ -n "$dry" ] || "$@"
}

skip() {
  echo "skipped: $*"
  exit 77
}

need_gpu() {
  if [ -n "$rehearse" ]; then skip "a rehearsal, without a GPU"; fi
}

step_facts() {
  say_and_run nvidia-smi
  say_and_run "$python" -m pip list --format=freeze
  [ -z "$dry" ] || return 0
  [ -n "$rehearse" ] || "$python" -c 'import torch; torch.zeros(1, device="cuda")'
}

step_build() {
  local arch=9.0
  if [ -z "$rehearse$dry" ]; then
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  fi
  export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch
  if "$python" -c 'import pybind11' 2> /dev/null; then
    say_and_run "$python" setup.py build_ext --inplace
  else
    echo "no pybind11: the libraries are built without the module that knows facts of the build"
    say_and_run "$python" -m cbam_ext.building.compile "$work/libraries" &&
      say_and_run cp "$work"/libraries/cbam_ext/*.so cbam_ext/
  fi || return
  say_and_run "$python" -m cbam_ext
}

step_kernels() {
  say_and_run "$python" -m bench.inspect_cuda --check | tee "$out/kernels.txt"
}

run_pytest() {
  # The slow ones too.
  CBAM_TEST_BACKENDS=$device say_and_run "$python" -m pytest -q -p no:cacheprovider \
    -m "not install and not tools" "$@"
}

# pytest's options that leave out the test files whose imports are missing here.
files_to_ignore() {
  "$python" - << 'END'
import ast, importlib.util, pathlib, sys
sys.path.insert(0, "tests")
for path in sorted(pathlib.Path("tests").rglob("test_*.py")):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
        if missing:
            print(f"--ignore={path}")
            print(f"{path} is left out: {', '.join(missing)} is missing", file=sys.stderr)
            break
END
}

step_tests() {
  # tests/cuda is about the kernels without a GPU, but for test_cuda.py, whose parts are other steps.
  local options=(--ignore=tests/cuda --durations=10) ignored selection=cuda
  mapfile -t ignored < <(files_to_ignore)
  # Many processes share the GPU; each takes some hundred megabytes of it.
  if "$python" -c 'import xdist' 2> /dev/null; then
    options+=(-n "$((cores > 12 ? 8 : (cores + 1) / 2))")
  fi
  [ -z "$rehearse" ] || selection="test_determinism and cpu"
  run_pytest -k "$selection" "${options[@]}" "${ignored[@]}" tests
}

gpu_tests() {
  # They skip themselves where there are no kernels, which would look like success.
  if [ -z "$rehearse$dry" ]; then
    "$python" -c 'import cbam_ext; assert cbam_ext.ops.has_kernels("cuda"), "no CUDA kernels"' ||
      return
  fi
  run_pytest tests/cuda/test_cuda.py -rs -k "$1"
}

step_repeats() { gpu_tests repeats; }
step_graphs() { gpu_tests graph; }
step_streams() { gpu_tests "stream or device_of or no_second"; }
step_sizes() { gpu_tests "more_samples or sizes_over"; }
step_large() { gpu_tests large; }

sanitize() {
  local tool=$1
  shift
  local program=("$python" -m bench.exercise --device "$device" "$@")
  if [ -n "$rehearse" ]; then
    say_and_run "${program[@]}"
    return
  fi
  # Without the cache every tensor is an allocation of its own: what is beside it, or was never
  # written, shows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  say_and_run compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
    "${program[@]}"
}

step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck --dtypes float32 bfloat16; }
step_initcheck() { sanitize initcheck --dtypes float32 bfloat16; }
step_synccheck() { sanitize synccheck --dtypes float32 bfloat16; }

step_warmup() {
  need_gpu
  local dtype layout failures=0
  for dtype in float32 bfloat16; do
    for layout in nchw channels_last; do
      say_and_run "$python" -m bench --device "$device" --rounds 1 --output '' \
        --against compile --dtypes "$dtype" --layouts "$layout" &
    done
  done
  for job in $(jobs -p); do wait "$job" || failures=$((failures + 1)); done
  return "$failures"
}

step_benchmark() {
  local options=(--rounds 7)
  [ -z "$rehearse" ] || options=(--rounds 1 --shapes 2x16x16x16 --against eager)
  say_and_run "$python" -m bench --device "$device" --output "$out/benchmark" "${options[@]}"
}

step_profile() {
  need_gpu
  if ! command -v ncu; then skip "no ncu"; fi
  # The whole program runs again for each group of counters, with its caches as they are: what a
  # launch finds in L2 is the point.
  local counters=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  counters+=,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct
  counters+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  counters+=,launch__grid_size
  say_and_run ncu --replay-mode application --clock-control none --cache-control none \
    --kernel-name-base mangled --kernel-name regex:4cbam --metrics "$counters" \
    --csv --page raw --log-file "$out/profile.csv" \
    "$python" -m bench.exercise --no-check --offsets 0 --dtypes bfloat16 \
    --shapes 64x256x56x56 64x64x112x112 8x512x7x7 || skip "ncu cannot read the counters here"
}

while read -r _ _ name; do export -f "${name?}"; done < <(declare -F)

# --- running them --------------------------------------------------------------------------------

# Runs one step within its time; leaves its output, and a line "step result seconds".
run_step() {
  local step=$1 begin=$SECONDS seconds=$((limit - SECONDS)) result
  [ "$seconds" -lt "${most[$step]}" ] || seconds=${most[$step]}
  if [ "$seconds" -le 0 ]; then
    echo "no time was left" > "$work/$step.log"
    echo "$step FAIL 0 no time was left" > "$work/$step.result"
    return
  fi
  timeout --kill-after=5 "$seconds" bash -c "set -uo pipefail; step_$step" > "$work/$step.log" 2>&1
  case $? in
    0) result=PASS ;;
    77) result=SKIP ;;
    124 | 137) result=FAIL && echo "stopped after $seconds s" >> "$work/$step.log" ;;
    *) result=FAIL ;;
  esac
  # The last line that says something is what the table shows.
  local last
  last=$(grep -v '^[[:space:]]*$' "$work/$step.log" | tail -n 1 | tr -d '\r' | cut -c -90)
  echo "$step $result $((SECONDS - begin)) $last" > "$work/$step.result"
  echo "gpu_check: $step: $result after $((SECONDS - begin)) s" >&2
}

# Puts what a step left into the folder; at once, in case something ends this script.
collect() {
  local step=$1
  {
    echo "===== $step ====="
    cat "$work/$step.log"
    echo
  } >> "$out/log.txt"
  cat "$work/$step.result" >> "$work/results"
  awk '{ line = sprintf("%-10s %-4s %4d s  ", $1, $2, $3); $1 = $2 = $3 = ""; print line substr($0, 4) }' \
    "$work/results" > "$out/summary.txt"
  "$python" - "$work/results" > "$out/results.json" << 'END'
import json, os, subprocess, sys
def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available: {error}"
steps = []
for line in open(sys.argv[1]):
    name, result, seconds, *last = line.split(maxsplit=3)
    steps.append({"step": name, "result": result, "seconds": int(seconds), "last_line": "".join(last).strip()})
query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
facts = {
    "gpu": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
    "cores": os.cpu_count(),
    "commit": said("git", "describe", "--always", "--dirty"),
    "date": said("date", "-u", "+%Y-%m-%dT%H:%M:%SZ"),
}
json.dump({"facts": facts, "steps": steps}, sys.stdout, indent=1)
print()
END
}

contains() {
  local name=$1 other
  shift
  for other in "$@"; do [ "$name" != "$other" ] || return 0; done
  return 1
}

if [ -n "$dry" ]; then
  for step in "${wanted[@]}"; do
    echo "# $step, at most ${most[$step]} s"
    bash -c "set -uo pipefail; step_$step"
  done
  exit 0
fi

rm -f "$out"/{summary.txt,results.json,log.txt,kernels.txt,profile.csv} "$out"/benchmark.{json,md,png}
beside=()
finish_beside() {
  local each
  [ ${#beside[@]} -gt 0 ] || return 0
  wait
  for each in "${beside[@]}"; do collect "$each"; done
  beside=()
}
for step in "${steps[@]}"; do
  contains "$step" "${wanted[@]}" || continue
  if contains "$step" "${together[@]}"; then
    run_step "$step" &
    beside+=("$step")
    continue
  fi
  finish_beside
  run_step "$step"
  collect "$step"
done
finish_beside

echo
cat "$out/summary.txt"
failures=$(grep -c ' FAIL ' "$out/summary.txt")
echo "$failures failed in $SECONDS s; everything is in $out"
[ "$failures" -eq 0 ]
