#!/usr/bin/env bash
# GPT-3 XL, 1.3 billion parameters: 24 layers, hidden size 2048, sequences of 2048 tokens
# (Brown et al. 2020, arXiv 2005.14165, table 2.1).
#
#     DATA=runs/web/train VALID=runs/web/valid examples/pretrain_gpt3-1.3b.sh
#
# Two machines of 8 GPUs: run it on both, on the second with NODE_RANK=1
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=machine-0 examples/pretrain_gpt3-1.3b.sh
#
# DRY=1 starts nothing: it checks every setting, draws the layout and prints the memory a rank
# needs, on any laptop. Flags given to this script are added to those below; to change one of
# those, copy the file.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
gpus=${GPUS:-8}            # ranks on each machine
export NNODES=${NNODES:-1} # machines
data=${DATA:-synthetic}    # a prefix that `megalite preprocess` wrote; synthetic measures speed
valid=${VALID:-}
out=${OUT:-runs/gpt3-1.3b}

layout=(
    # Each matrix is cut over 2 GPUs. They talk in every layer, so keep tp inside one machine.
    --tp 2
    # 1.3B parameters need no pipeline. A larger model raises pp next: it sends little, and only
    # between neighbours, so it may cross machines.
    --pp 1
    # The ranks that tp and pp leave are data parallel; each keeps a part of the optimizer state.
    --zero 1
)
batch=(
    --seq-len 2048
    # What one GPU runs at once. Halve it when memory runs out: the result stays the same.
    --micro-batch-size 4
    # Sequences of one step: 1M tokens. Each rank accumulates over the microbatches this leaves it.
    --global-batch-size 512
)
optimizer=(
    --lr 2e-4 --min-lr-ratio 0.1 --lr-decay cosine
    --warmup-steps 360    # 375M tokens
    --train-steps 286000  # 300B tokens
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
)
report=(--log-interval 10 --eval-interval 1000 --save-interval 1000)
settings=(--model gpt3-1.3b --data "$data" --out "$out")
settings+=("${layout[@]}" "${batch[@]}" "${optimizer[@]}" "${report[@]}")
if [ -n "$valid" ]; then settings+=(--valid-data "$valid"); fi

if [ "${DRY:-0}" = 1 ]; then
    python="$root/.venv/bin/python"
    [ -x "$python" ] || python=${PYTHON:-python3}
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec "$python" -m megalite pretrain "${settings[@]}" \
        --dry-run --world $((NNODES * gpus)) ${1+"$@"}
fi
exec "$root/examples/launch.sh" "$gpus" pretrain "${settings[@]}" ${1+"$@"}
