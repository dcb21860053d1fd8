#!/usr/bin/env bash
# Every table of docs/speed.md, one after another: an hour and a half on two cores, with nothing else running.
#
#     benchmarks/speed.sh FOLDER/OF/SmolLM2-135M-Instruct | tee speed.log
#     benchmarks/speed.sh FOLDER packed growth    # these tables alone
set -euo pipefail
trap 'jobs -p | xargs -r kill' EXIT
model=$(realpath "$1")
shift
cd "$(dirname "$0")"
step=(python -W ignore step.py)
sampling=(python -W ignore sampling.py --ways prepacked bfloat16 "as they are")
ours=(GradeSTE "GradeSTE, hops 2" RLOO GRPO)
trl=("TRL RLOO, β = 0.05" "TRL GRPO, β = 0.04")
beside=(--beside RLOO "${trl[@]}")

small() {
    "${step[@]}" --rounds 10 --no-memory --only "${ours[@]}" "RLOO, no reference" "RLOO, weights as they are" \
        "TRL RLOO, β = 0" "TRL GRPO, β = 0" "${trl[@]}" "${beside[@]}"
}
alike() { "${step[@]}" --rounds 10 --no-memory --keep-memory --only GradeSTE RLOO GRPO "${trl[@]}" "${beside[@]}"; }
memory() { "${step[@]}" --rounds 0; }
larger() {
    "${step[@]}" --rounds 10 --warm 1 --no-memory --layers 12 --width 576 --vocabulary 49152 --batch 8 \
        --only "${ours[@]}" "${trl[@]}" "${beside[@]}"
}
real() {
    for adapters in "--lora 16" ""; do
        # shellcheck disable=SC2086
        "${step[@]}" --model "$model" $adapters --batch 8 --rounds 6 --warm 1 --no-memory \
            --only GradeSTE RLOO "TRL RLOO, β = 0.05" --beside RLOO "TRL RLOO, β = 0.05"
    done
}
packed() { OMP_NUM_THREADS=1 python -W ignore padding.py --rounds 4 --model "$model"; }
growth() { python -W ignore scaling.py --figure ../docs/figures/scaling.png --jobs 2; }
phases() { OMP_NUM_THREADS=1 python -W ignore phases.py; }
sampling() {
    "${sampling[@]}" --length 64 256 512
    "${sampling[@]}" --layers 12 --width 576 --vocabulary 49152 --batch 8 --rounds 4
    "${sampling[@]}" --model "$model" --batch 16 --rounds 4
    "${sampling[@]}" --model "$model" --lora 16 --batch 8 --rounds 4
}
bfloat16() {
    "${step[@]}" --rounds 10 --no-memory --precision bf16-mixed --only GradeSTE RLOO GRPO "${trl[@]}" "${beside[@]}"
}
busy() { # beside a program that takes one core
    (while :; do :; done) &
    local other=$! way
    for way in OMP_WAIT_POLICY=active OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 ""; do
        echo "${way:-as they are}"
        # shellcheck disable=SC2086
        env $way "${step[@]}" --rounds 5 --warm 1 --no-memory --only RLOO "TRL RLOO, β = 0.05"
    done
    kill "$other"
    echo "OMP_WAIT_POLICY=passive, and nothing else running"
    OMP_WAIT_POLICY=passive "${step[@]}" --rounds 5 --warm 1 --no-memory --only RLOO "TRL RLOO, β = 0.05"
}
others() {
    "${step[@]}" --rounds 4 --warm 1 --no-memory --beside RLOO "TRL RLOO, β = 0" --only RLOO "GradeSTE, hops 4" \
        "GradeSTE, exact" "Grade (soft)" "PPO, 4 updates" "unrolled, cache" "unrolled, as published" \
        "unrolled, one checkpoint" "TRL RLOO, β = 0"
    "${step[@]}" --rounds 1 --warm 0 --no-memory --batch 8 --length 256 \
        --only GradeSTE "unrolled, as published" --beside GradeSTE
}
freed() { # the C library's own way with freed memory, to be held beside `growth`
    MALLOC_TRIM_THRESHOLD_=131072 python -W ignore scaling.py --length 64 512 --vocabulary --batch --hops --no-memory
}
shared() { OMP_NUM_THREADS=1 python -W ignore prefix.py --rounds 3; }
chunks() {
    local sizes=(--vocabulary --batch --hops --at 64 4096 4 0 --layers 8 --rounds 0)
    python -W ignore scaling.py "${sizes[@]}" --length 256 1024 2048
    python -W ignore scaling.py "${sizes[@]}" --length 256 1024 2048 --chunk 256
}

echo "commit $(git rev-parse --short HEAD)"
for table in "${@:-small alike memory larger real packed growth phases sampling bfloat16 busy others freed shared chunks}"; do
    for part in $table; do
        echo "# $part, $(date +%H:%M:%S)"
        "$part"
    done
done
