#!/usr/bin/env bash
# One training job over every GPU of this machine, or over two CPU processes where there is none.
#
#   ./train_ddp.sh                              the demo
#   ./train_ddp.sh my.toml --lr 0.05            a recipe (file or built-in name), then any option of cofinetune.py
#   GPUS=4 RESTARTS=3 ./train_ddp.sh vivit-b    fewer GPUs; start again from last.pt after a crash, up to 3 times
#
# Several machines: the same command on each of them, rank 0's address in MASTER (tried with two nodes on one machine):
#   NODES=2 NODE=0 MASTER=host0:29500 ./train_ddp.sh vivit-b
#   NODES=2 NODE=1 MASTER=host0:29500 ./train_ddp.sh vivit-b
set -euo pipefail
here=$(dirname "$0")
recipe=()
if [[ $# -gt 0 && $1 != -* ]]; then recipe=(--recipe "$1"); shift; fi
if [[ -n ${NODES:-} ]]; then
    where=(--nnodes="$NODES" --node-rank="${NODE:?}" --master-addr="${MASTER%:*}" --master-port="${MASTER##*:}")
else
    where=(--standalone)
fi
# Without this every process takes a thread per core, and they wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without this a restarted process dials the port of its dead predecessor (RESTARTS; torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec ${PYTHON:-python} -P "$here/extras/launch.py" "${where[@]}" --nproc-per-node="${PROCESSES:-${GPUS:-auto}}" \
    --max-restarts="${RESTARTS:-0}" "$here/cofinetune.py" ${recipe[@]+"${recipe[@]}"} "$@"
