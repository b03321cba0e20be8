#!/usr/bin/env bash
# Stage 1 of a recipe on GPUs.
#
#   RECIPE=examples/recipes/haplovl-7b/stage1.yaml SAVE=runs/7b/stage1 TOKENIZER_MODEL=vicuna-7b-v1.5 \
#     bash examples/ds_pretrain_haplovl.sh --vision-teacher clip-vit-large-patch14-336 \
#     --language-model vicuna-7b-v1.5 --data-path data/7b/instructions --aux-data-path data/7b/captions
#
# A recipe holds the model and all settings but paths. TOKENIZER_MODEL becomes --tokenizer-model: data that was
# preprocessed with another tokenizer is then refused. Flags go to pretrain_haplovl.py and win over the recipe.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

MODEL_ARGS=(--config "${RECIPE:?file of settings, such as examples/recipes/haplovl-7b/stage1.yaml}")
TRAINING_ARGS=(
  --save "${SAVE:?folder for checkpoints}"
  --load "$SAVE"
  --save-interval 1000
  --keep-last 2
  --keep-every 10000
  --metrics-file "$SAVE/metrics.jsonl"
)
DATA_ARGS=(--tokenizer-model "${TOKENIZER_MODEL:?folder of the tokenizer, most often the language model}")

launch pretrain_haplovl.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
