#!/usr/bin/env bash
# Train a small HaploVL through both stages on rendered scenes, export it, measure it and ask it a question, on a CPU.
#
#   bash examples/quickstart.sh
#
# Everything lands in runs/quickstart. A second call keeps every phase that is done; delete the folder to start anew.
#
#   NUM_PROCESSES=N   ranks that train (default: 2)
#   PRECISION=bf16|fp32    number format (default: the one that is faster on this machine)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
# shellcheck source=examples/common/recipe.sh
source examples/common/recipe.sh

RUN=runs/quickstart
NUM_PROCESSES=${NUM_PROCESSES:-2}
DATA=$RUN/data
DATA_PHASE=data
IMAGES=$DATA/images
QUESTION="How many shapes?"
QUESTION_IMAGE=$IMAGES/heldout/000000.png
PREPROCESSED_DATA=$RUN/preprocessed
VISION_TEACHER_DATA=(--train "$DATA/captions.json" --heldout "$DATA/heldout_captions.json" --image-folder "$IMAGES")

mkdir -p "$RUN"
BF16_ARGS=()
PRECISION=$(python -m examples.common.pick_precision --file "$RUN/precision" "${PRECISION:-auto}")
if [ "$PRECISION" = bf16 ]; then
  BF16_ARGS=(--bf16)
fi

# The numbers below were tuned on two cores for accuracy within ten minutes; they are no recipe for a large model.
VOCAB_SIZE=768
MODEL_ARGS=(--model haplovl-debug --vocab-size $VOCAB_SIZE --seq-length 256)
TOKENIZER_ARGS=(--vocab-size $VOCAB_SIZE)
VISION_TEACHER_ARGS=(--steps 400 --batch-size 64 --lr 1e-3 "${BF16_ARGS[@]}")
LANGUAGE_MODEL_ARGS=(--vocab-size $VOCAB_SIZE --steps 600 --batch-size 16 --lr 1e-3 "${BF16_ARGS[@]}")
TRAINING_ARGS=(
  --init-std 0.07
  --micro-batch-size 4
  --global-batch-size 8
  --num-workers 0
  --zero-stage 1
  --log-interval 10
  --eval-iters 10
  "${BF16_ARGS[@]}"
)
STAGE1_ARGS=(
  "${TRAINING_ARGS[@]}"
  --data-path 2 "$PREPROCESSED_DATA/instructions" 1 "$PREPROCESSED_DATA/texts"
  --aux-data-path "$PREPROCESSED_DATA/captions"
  --train-iters 300
  --lr 1e-3
  --lr-warmup-iters 20
  --eval-interval 50
)
ALIGN_ARGS=(
  "${TRAINING_ARGS[@]}"
  --data-path "$PREPROCESSED_DATA/captions"
  --train-iters 150
  --lr 3e-3
  --lr-warmup-iters 10
  --eval-interval 50
)
FULL_ARGS=(
  "${TRAINING_ARGS[@]}"
  --data-path 3 "$PREPROCESSED_DATA/instructions" 1 "$PREPROCESSED_DATA/captions" 1 "$PREPROCESSED_DATA/texts"
  --train-iters 2200
  --lr 1.5e-3
  --lr-warmup-iters 30
  --eval-interval 250
)

phase data --inputs examples/quickstart examples/common/questions.py examples/common/llava_json.py \
  --output "$DATA" -- python -m examples.quickstart.make_demo_data --output "$DATA"
run_recipe
