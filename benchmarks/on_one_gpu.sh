#!/usr/bin/env bash
# What only a GPU can say, the most important first. Each part writes its results as it goes, and a part that fails does
# not keep the next from running:
#
#     benchmarks/on_one_gpu.sh OUTPUT_FOLDER [PRETRAINED_VIT]     # about 15 minutes on an H200
#     benchmarks/on_one_gpu.sh OUTPUT_FOLDER --quick              # on a CPU: shows that the commands run
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:?give an output folder}
mkdir -p "$out"
if [ "${2:-}" = --quick ]; then
    "$python" benchmarks/cost.py --model vit-tiny bert-tiny --contenders plain gnp loop_sam --steps 10 --output_dir "$out"
    exec "$python" benchmarks/study.py defaults --quick --output_dir "$out"
fi

# 1. The tests that need a GPU.
LIMIT=${LIMIT:-280} tests/gpu/run.sh "$out/tests"
# 2. Time, memory, host reads and the share of the matmul rate, against a hand-written loop.
for model in vit-b16 bert-base llama-1b; do
    timeout 120 "$python" benchmarks/cost.py --model "$model" --bf16 --contenders plain gnp gnp_layer sam gnp_momentum loop_sam \
        --output_dir "$out"
done
# 3. A pretrained ViT to convergence, clean and noisy labels.
[ -z "${2:-}" ] || timeout 280 "$python" benchmarks/study.py convergence --model_path "$2" --output_dir "$out" --jobs 8
