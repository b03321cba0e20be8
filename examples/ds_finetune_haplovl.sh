#!/usr/bin/env bash
# A part of stage 2 of a recipe on GPUs. For haplovl-7b the connector first, then everything:
#
#   export TOKENIZER_MODEL=vicuna-7b-v1.5
#   RECIPE=examples/recipes/haplovl-7b/align.yaml SAVE=runs/7b/align bash examples/ds_finetune_haplovl.sh \
#     --pretrained-checkpoint runs/7b/stage1 --language-model vicuna-7b-v1.5 --data-path data/7b/captions
#   RECIPE=examples/recipes/haplovl-7b/instructions.yaml SAVE=runs/7b/full bash examples/ds_finetune_haplovl.sh \
#     --pretrained-checkpoint runs/7b/align --data-path data/7b/instructions
#
# A recipe holds the model and all settings but paths. TOKENIZER_MODEL becomes --tokenizer-model: data that was
# preprocessed with another tokenizer is then refused. Flags go to finetune_haplovl.py and win over the recipe.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

MODEL_ARGS=(--config "${RECIPE:?file of settings, such as examples/recipes/haplovl-7b/align.yaml}")
TRAINING_ARGS=(
  --save "${SAVE:?folder for checkpoints}"
  --load "$SAVE"
  --save-interval 500
  --keep-last 2
  --keep-every 5000
  --metrics-file "$SAVE/metrics.jsonl"
)
DATA_ARGS=(--tokenizer-model "${TOKENIZER_MODEL:?folder of the tokenizer, most often the language model}")

launch finetune_haplovl.py \
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
