#!/usr/bin/env bash
# A few steps of haplovl-debug on mock data: do the machines find each other, does this layout run? Before a long run.
#
#   NUM_GPUS=8 bash examples/ds_try_launch.sh --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 3
#
# Further flags go to finetune_haplovl.py and win over those below.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

# Eight heads in both decoders, for eight tensor- or context-parallel ranks to share.
MODEL_ARGS=(
  --model haplovl-debug
  --pre-num-attention-heads 8
  --post-hidden-size 128
  --post-num-attention-heads 8
  --post-num-key-value-heads 8
)

TRAINING_ARGS=(
  --train-iters 10
  --global-batch-size 64
  --micro-batch-size 1
  --log-interval 1
)

DATA_ARGS=(
  --mock-data
  --seq-length 128
  --num-workers 0
)

exec "$LAUNCHER" "${DISTRIBUTED_ARGS[@]}" finetune_haplovl.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
