#!/usr/bin/env bash
# Stage 1, modal expansion, of haplovl-7b or haplovl-8b on GPUs, with the paper's settings (Sec. 4.1 and Table 8).
#
#   MODEL=haplovl-7b VISION_TEACHER=clip-vit-large-patch14-336 LANGUAGE_MODEL=vicuna-7b-v1.5 \
#     DATA=data/7b SAVE=runs/7b/stage1 bash examples/ds_pretrain_haplovl.sh
#
# DATA holds what tools/preprocess_data.py wrote: instructions.*, captions.*, and heldout.* for evaluation.
#
# Further flags go to pretrain_haplovl.py and win over those below: --tensor-model-parallel-size 2 --zero-stage 2, say.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

MODEL=${MODEL:-haplovl-7b}
DATA=${DATA:?folder of the preprocessed data}
SAVE=${SAVE:?folder for checkpoints}
VISION_TEACHER=${VISION_TEACHER:?folder of CLIP-ViT-L/14-336}
LANGUAGE_MODEL=${LANGUAGE_MODEL:?folder of Vicuna-7B for haplovl-7b, of Llama-3-8B for haplovl-8b}

MODEL_ARGS=(
  --model "$MODEL"
  --vision-teacher "$VISION_TEACHER"
  --language-model "$LANGUAGE_MODEL"
)

TRAINING_ARGS=(
  --train-iters 40000
  --global-batch-size 256
  --micro-batch-size 4
  --lr 1e-4
  --lr-decay-style cosine
  --lr-warmup-iters 2000
  --adam-beta1 0.9
  --adam-beta2 0.95
  --weight-decay 1e-4
  --bf16
  --zero-stage 1
  --save "$SAVE"
  --load "$SAVE"
  --save-interval 1000
  --log-interval 10
  --eval-interval 1000
  --metrics-file "$SAVE/metrics.jsonl"
)

# Every instruction is joined with a caption, before or behind it ("mix-v2", paper Appendix B).
DATA_ARGS=(
  --data-path "$DATA/instructions"
  --aux-data-path "$DATA/captions"
  --valid-data-path "$DATA/heldout"
  --tokenizer-model "$LANGUAGE_MODEL"
  --num-workers 8
)

exec "$LAUNCHER" "${DISTRIBUTED_ARGS[@]}" pretrain_haplovl.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
