#!/usr/bin/env bash
# Starts N ranks of megalite on this machine:
#
#     examples/launch.sh N VERB [FLAGS]        examples/launch.sh 8 pretrain --tp 2 --pp 2
#
# On several machines run the same line on each, with NNODES (how many), NODE_RANK (which one this
# is, from 0) and MASTER_ADDR (the name of machine 0; MASTER_PORT is 29500 unless set): NNODES x N
# ranks in all.
#
# This is the one place that sets what ranks need from their environment and calls torchrun.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: examples/launch.sh N VERB [FLAGS] (examples/launch.sh 8 pretrain --tp 2)" >&2
    exit 2
fi
ranks=$1
shift

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
python="$root/.venv/bin/python"
[ -x "$python" ] || python=${PYTHON:-python3}
has_torch='import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'
if ! "$python" -c "$has_torch"; then
    echo "megalite: error: $python has no torch (make .venv, or set PYTHON to one that has)" >&2
    exit 2
fi

# Ranks share the cores. Without a limit each starts a thread for every core, and all wait.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
# Rank 0 opens a store of its own: in torchrun's, a restarted run reads the dead one's addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ "${NNODES:-1}" -gt 1 ]; then
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?must be 0 to NNODES - 1}"
        --master-addr "${MASTER_ADDR:?must be the name of machine 0}"
        --master-port "${MASTER_PORT:-29500}")
else
    # localhost, because the machine's own name need not resolve (macOS, containers).
    where=(--standalone --local-addr localhost)
fi
arguments=("${where[@]}" --nproc-per-node "$ranks" -m megalite "$@")

settings="OMP_NUM_THREADS=$OMP_NUM_THREADS TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
echo "+ $settings torchrun ${arguments[*]}"
exec "$python" "$here/launch.py" "${arguments[@]}"
