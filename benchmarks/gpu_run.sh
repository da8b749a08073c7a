#!/usr/bin/env bash
# Everything that is known only on an NVIDIA GPU, in order of value, in eight minutes: tests, checkers, benchmarks.
#
#   benchmarks/gpu_run.sh [OUTPUT_FOLDER]      default: build/gpu
#
# Needs a CUDA build of torch, transformers 5, and what `pip install '.[hf,cli,plots,cuda]' pytest hypothesis`
# installs (with pytest-xdist the tests run in four processes); nothing is downloaded. Without an installed occamkv the
# sources beside this script are taken. PYTHON names another Python, GPU_RUN_SECONDS another limit. compute-sanitizer
# and ncu are used where they are. The card's settings are left alone.
#
# A step that fails or takes too long is noted in log.txt, and the next one begins; the exit code is then 1. These
# files are written, and no others:
#   log.txt tests.txt tools.txt bench-attend.json bench-attend.png bench-encode.json bench-decode.json bench-decode.png
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 2
rm -f "$out"/{log,tests,tools}.txt "$out"/bench-{attend,encode,decode}.json "$out"/bench-{attend,decode}.png
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
occamkv=("$python" -c 'from occamkv.cli import main; main()')
case=("$python" benchmarks/gpu_case.py)
most_bytes=$((16 * 1024 * 1024 - 1))
deadline=$((SECONDS + ${GPU_RUN_SECONDS:-480}))
failed=0

note() {
    echo "$*" | tee -a "$out/log.txt"
}

# step NAME SECONDS FILE COMMAND...: run a command for so long at most; what it says goes to the end of FILE
step() {
    local name=$1 limit=$2 file=$out/$3 start=$SECONDS code=0
    shift 3
    if ((deadline - SECONDS < limit)); then limit=$((deadline - SECONDS)); fi
    if ((limit <= 0)); then
        note "LEFT OUT $name: no time is left"
        failed=1
        return
    fi
    echo "== $name" >>"$file"
    timeout --kill-after=5 "$limit" "$@" >>"$file" 2>&1 || code=$?
    if ((code == 0)); then
        note "ok $name: $((SECONDS - start)) s"
    else
        note "FAILED $name: exit code $code after $((SECONDS - start)) s of $limit (124: out of time); see $(basename "$file")"
        failed=1
    fi
}

have() {
    command -v "$1" >/dev/null 2>&1 || { note "left out: $1 is not here"; false; }
}

plot() {
    if "$python" -c 'import matplotlib' 2>/dev/null; then echo "--plot=$out/$1"; fi
}

note "$(date -u +%FT%TZ) $(git rev-parse --short HEAD 2>/dev/null)"
step environment 20 log.txt bash -c 'nvidia-smi; "$@"' bash "${occamkv[@]}" doctor
step "the tensor core reads subnormals" 30 tests.txt \
    "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_gpu.py -k subnormals
parallel=() # most of the time of these tests is that of compiling some eighty kernels
if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 4); fi
step "tests on the GPU" 100 tests.txt "$python" -m pytest -q -p no:cacheprovider -m gpu \
    ${parallel[@]+"${parallel[@]}"} --continue-on-collection-errors tests
if have compute-sanitizer; then
    for tool in memcheck racecheck; do
        step "$tool" 30 tools.txt compute-sanitizer --tool "$tool" --error-exitcode 9 "${case[@]}"
    done
fi
mapfile -t drawn < <(plot bench-attend.png)
step "bench attend" 120 log.txt "${occamkv[@]}" bench attend --device cuda --method oscar,occam \
    --budget-seconds 60 --json "$out/bench-attend.json" ${drawn[@]+"${drawn[@]}"}
step "bench encode" 30 log.txt "${occamkv[@]}" bench encode --device cuda --method oscar,occam \
    --json "$out/bench-encode.json"
mapfile -t drawn < <(plot bench-decode.png)
step "bench decode" 120 log.txt "${occamkv[@]}" bench decode --device cuda --method oscar,occam \
    --budget-seconds 65 --json "$out/bench-decode.json" ${drawn[@]+"${drawn[@]}"}
if have ncu; then
    for head_dim in 128 64 256; do
        step "ncu, head_dim $head_dim" 20 tools.txt ncu --clock-control none --kernel-name regex:occamkv_attend \
            --launch-count 1 --section SpeedOfLight --section MemoryWorkloadAnalysis --section SchedulerStats \
            --section WarpStateStats --section Occupancy --section LaunchStats \
            "${case[@]}" --head-dim "$head_dim" --context 32768 --batch 8 --kv-heads 8
    done
fi
for file in "$out"/{log,tests,tools}.txt; do
    if [ -f "$file" ]; then truncate --size "<$most_bytes" "$file"; fi
done
exit "$failed"
