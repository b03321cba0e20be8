#!/usr/bin/env bash
# Stage 2 of haplovl-7b or haplovl-8b on GPUs, with the paper's settings (Sec. 4.1 and Table 9).
#
# haplovl-7b: first the connector on captions, then everything on instructions.
#
#   PHASE=align MODEL=haplovl-7b LANGUAGE_MODEL=vicuna-7b-v1.5 START=runs/7b/stage1 DATA=data/7b/captions \
#     SAVE=runs/7b/align TRAIN_ITERS=4360 bash examples/ds_finetune_haplovl.sh
#   PHASE=full MODEL=haplovl-7b LANGUAGE_MODEL=vicuna-7b-v1.5 START=runs/7b/align DATA=data/7b/instructions \
#     SAVE=runs/7b/full TRAIN_ITERS=5200 bash examples/ds_finetune_haplovl.sh
#
# haplovl-8b sees any resolution, which the stage-1 pre-decoder has to learn: everything trains in both phases, first on
# 1.2M captions, then on 4M instructions (PHASE=full twice).
#
# The iterations above are one epoch of LLaVA-1.5's data at one sample per sequence, as the paper counts (--no-packing); add
# that flag to repeat them, or leave packing on and choose fewer. DATA is the prefix of what tools/preprocess_data.py wrote.
#
# Further flags go to finetune_haplovl.py and win over those below: --tensor-model-parallel-size 2 --zero-stage 3, say.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

MODEL=${MODEL:-haplovl-7b}
PHASE=${PHASE:?align (connector only) or full (everything)}
START=${START:?checkpoint to start from: stage 1, or the phase before}
DATA=${DATA:?prefix of the preprocessed data}
SAVE=${SAVE:?folder for checkpoints}
TRAIN_ITERS=${TRAIN_ITERS:?optimizer steps}
LANGUAGE_MODEL=${LANGUAGE_MODEL:?folder of Vicuna-7B for haplovl-7b, of Llama-3-8B for haplovl-8b}

# Where START has a post-decoder already, its weights win over the language model's.
MODEL_ARGS=(
  --model "$MODEL"
  --recipe "$PHASE"
  --pretrained-checkpoint "$START"
  --language-model "$LANGUAGE_MODEL"
)

TRAINING_ARGS=(
  --train-iters "$TRAIN_ITERS"
  --global-batch-size 128
  --micro-batch-size 1
  --lr-decay-style cosine
  --adam-beta1 0.9
  --adam-beta2 0.98
  --weight-decay 0
  --bf16
  --zero-stage 2
  --save "$SAVE"
  --load "$SAVE"
  --save-interval 500
  --log-interval 10
)
if [ "$PHASE" = align ]; then
  # A new matrix takes larger steps than pretrained ones; the paper is silent, this is LLaVA's value for its projector.
  TRAINING_ARGS+=(--lr 1e-3)
else
  TRAINING_ARGS+=(--lr 2e-5)
fi

DATA_ARGS=(
  --data-path "$DATA"
  --tokenizer-model "$LANGUAGE_MODEL"
  --num-workers 8
)

exec "$LAUNCHER" "${DISTRIBUTED_ARGS[@]}" finetune_haplovl.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
