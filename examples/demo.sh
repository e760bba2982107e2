#!/usr/bin/env bash
# From raw text to a model that answers on this machine: the steps of `make demo`, each of which can
# be run by hand.
#
# Everything is written to runs/demo and runs/demo-chat. A step is skipped when its output is there
# and newer than its input, and training goes on from the last checkpoint; `rm -r runs/demo
# runs/demo-chat` starts anew. Flags given to this script go to `megalite pretrain`. SMOKE=1: two
# steps on a little text in one process, which shows that every command runs and teaches nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
demo=runs/demo

# step OUTPUT INPUT COMMAND...: prints and runs COMMAND unless OUTPUT is up to date. Every OUTPUT is
# put in place by a rename once it is whole, so one that exists is complete.
step() {
    local output=$1 input=$2
    shift 2
    if [ -s "$output" ] && { [ -z "$input" ] || [ ! "$input" -nt "$output" ]; }; then
        echo "= $output is there"
        return
    fi
    echo "+ megalite $*"
    "$python" -m megalite "$@"
}

# The layout of the recipe is for 8 ranks. On a machine with fewer GPUs than that it shrinks to one
# rank a GPU, first in the data, then in the pipeline, then in the tensor axis. Without a GPU the 8
# ranks are 8 CPU processes.
gpus=0
if nvidia-smi -L >/dev/null 2>&1; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
case $gpus in
    1) ranks=1 layout=(--tp 1 --pp 1 --dp 1) ;;
    2 | 3) ranks=2 layout=(--tp 2 --pp 1 --dp 1) ;;
    4 | 5 | 6 | 7) ranks=4 layout=(--tp 2 --pp 2 --dp 1) ;;
    *) ranks=8 layout=() ;;
esac
text=() tuning=()
if [ -n "${SMOKE:-}" ]; then
    ranks=1
    text=(--stdlib "$("$python" -c 'import email; print(email.__path__[0])')")
    tuning=(--train-steps 2 --dp 1 --warmup-steps 0 --device cpu)
    tuning+=(--micro-batch-size 1 --global-batch-size 2)
    layout=(--tp 1 --pp 1 "${tuning[@]}")
fi

step $demo/corpus/corpus.json "" corpus --out $demo/corpus ${text[@]+"${text[@]}"}
step $demo/tokenizer.json $demo/corpus/train.jsonl \
    tokenizer train --input $demo/corpus/train.jsonl --vocab-size 2048 --out $demo/tokenizer.json
for part in train valid; do
    # Measured against the text, as training writes its own copy of the tokenizer to the same place.
    step $demo/data/$part.idx $demo/corpus/$part.jsonl preprocess \
        --input $demo/corpus/$part.jsonl --tokenizer $demo/tokenizer.json --out $demo/data/$part
done

# train RUN RANKS VERB FLAG...: prints and runs a verb that trains, going on if it has begun.
train() {
    local run=$1 ranks=$2
    shift 2
    if ls -d $run/checkpoints/step-* >/dev/null 2>&1; then set -- "$@" --resume; fi
    echo "+ examples/launch.sh $ranks $*"
    examples/launch.sh "$ranks" "$@"
}

# bash 3.2 (macOS) takes an empty array for an unset one, hence the odd expansion.
train $demo $ranks pretrain --recipe demo ${layout[@]+"${layout[@]}"} ${1+"$@"}
report=(tools/sample_report.py $demo)
if [ -n "${SMOKE:-}" ]; then report+=(--samples 1 --tokens 4); fi
echo "+ $python ${report[*]}"
"$python" "${report[@]}"

step $demo/conversations/conversations.json "" conversations \
    --out $demo/conversations --functions 200 ${text[@]+"${text[@]}"}
# Two ranks for a small model on short conversations: a checkpoint loads into any other layout.
if [ -n "${SMOKE:-}" ]; then tuning+=(--valid-data ""); fi
train $demo-chat $((ranks > 1 ? 2 : 1)) sft --recipe chat ${tuning[@]+"${tuning[@]}"}
