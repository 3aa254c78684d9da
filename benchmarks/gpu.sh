#!/bin/sh
# Everything that only a GPU can show, in one go; what it prints goes into benchmarks/RESULTS.md.
#
#   benchmarks/gpu.sh > gpu.md            # about 20 minutes on one GPU, nothing is downloaded
#   benchmarks/gpu.sh --tiny > tiny.md    # the same with tiny models, on the CPU where there is no GPU: minutes
#
# 1. Every objective and gradient rule on the GPU against the CPU: one step, accumulation, bf16, torch.compile,
#    checkpointing, LoRA (tests/distributed/matrix.py). "fails", or "off" where docs/devices.md says "exact", is a bug.
# 2. Cost: ratios, images/s and memory in float32 and bf16, and through DDP of one process.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
if [ "${1:-}" = --tiny ]; then SIZE="--tiny --steps 12 --batch 8" ROWS="--rows task jacobian never_hurt"
else SIZE="--steps 60 --batch 64" ROWS=""; fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

DEVICE=$("$PYTHON" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
echo "## On $DEVICE, $(date -u +%Y-%m-%d)"
echo
echo "### Gradients"
echo
# shellcheck disable=SC2086  # lists of words
"$PYTHON" -m tests.distributed.matrix --device "$DEVICE" $ROWS
echo
echo "### Cost"
# shellcheck disable=SC2086
{
    "$PYTHON" benchmarks/gpu.py $SIZE
    "$PYTHON" benchmarks/gpu.py $SIZE --bf16
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/gpu.py $SIZE \
        --rows "plain Trainer" task logit_kd "logit_kd + jacobian" "logit_kd, never_hurt"
}
