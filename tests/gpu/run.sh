#!/usr/bin/env bash
# Everything for one GPU, the most important first, in parts of at most ten minutes (LIMIT seconds):
#
#     tests/gpu/run.sh [OUTPUT_FOLDER] [PART...]
#
# Needs no network, and a Python (PYTHON, default .venv/bin/python) that has torch with CUDA, transformers, accelerate,
# pytest, psutil and, but for the part "native", deepspeed and ninja. After each part results.json has all that ran so
# far, and a table is printed; a part that fails or runs out of time does not keep the next from running.
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${1:-build/gpu}
shift || true
mkdir -p "$out"
[ -z "${TORCH_CUDA_ARCH_LIST:-}" ] || export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST//[a-z]/}  # DeepSpeed 0.19 stops at "9.0a"

declare -A parts=(
    [native]="test_native or test_fp32 and (ddp or fsdp2 or checkpointed) or compiled"
    [zero]="test_fp32 and (zero or accumulated)"
    [bf16]="bf16"
    [fp16]="fp16"
)
[ $# -gt 0 ] || set -- native zero bf16 fp16

status=0
for part in "$@"; do
    timeout --kill-after=20 "${LIMIT:-590}" "$python" -m pytest tests/gpu -m gpu -k "${parts[$part]}" -rP \
        -o junit_logging=system-out --junitxml="$out/$part.xml" >"$out/$part.log" 2>&1
    code=$?
    [ $code -eq 0 ] || status=1
    "$python" tests/gpu/table.py "$out" "$part" $code
done
exit $status
