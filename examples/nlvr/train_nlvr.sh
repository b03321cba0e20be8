#!/usr/bin/env bash
# Train a small HaploVL on NLVR through both stages and measure it on held-out pictures, on a CPU.
#
#   bash examples/nlvr/train_nlvr.sh NLVR_PATH
#
# NLVR_PATH is the folder `nlvr` of a clone of https://github.com/lil-lab/nlvr, the one that holds dev/ and test/.
# Everything lands in runs/nlvr. A second call keeps every phase that is done; delete the folder to start anew.
#
#   NUM_PROCESSES=N   ranks that train (default: 2)
#   PRECISION=bf16|fp32    number format (default: the one that is faster on this machine)
set -euo pipefail
NLVR_PATH=$(cd "${1:?usage: bash examples/nlvr/train_nlvr.sh NLVR_PATH}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
# shellcheck source=examples/common/recipe.sh
source examples/common/recipe.sh

RUN=runs/nlvr
NUM_PROCESSES=${NUM_PROCESSES:-2}
DATA=$RUN/data
DATA_PHASE=data
IMAGES=$NLVR_PATH
PREPROCESSED_DATA=$RUN/preprocessed
VISION_TEACHER_DATA=(--train "$DATA/boxes.json" --heldout "$DATA/heldout_boxes.json" --image-folder "$DATA")

mkdir -p "$RUN"
BF16_ARGS=()
PRECISION=$(python -m examples.common.pick_precision --file "$RUN/precision" "${PRECISION:-auto}")
if [ "$PRECISION" = bf16 ]; then
  BF16_ARGS=(--bf16)
fi

# A picture of 400 x 100 pixels becomes four tiles in a row.
VOCAB_SIZE=1536
MODEL_ARGS=(
  --model haplovl-debug
  --vocab-size $VOCAB_SIZE
  --image-aspect-ratio anyres
  --max-tiles 4
  --image-newline
  --seq-length 512
)
TOKENIZER_ARGS=(--vocab-size $VOCAB_SIZE)
VISION_TEACHER_ARGS=(--steps 250 --batch-size 64 --lr 1e-3 "${BF16_ARGS[@]}")
LANGUAGE_MODEL_ARGS=(--vocab-size $VOCAB_SIZE --steps 300 --batch-size 8 --lr 1e-3 "${BF16_ARGS[@]}")
TRAINING_ARGS=(
  --init-std 0.07
  --micro-batch-size 2
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
  --train-iters 150
  --lr 1e-3
  --lr-warmup-iters 20
)
ALIGN_ARGS=(
  "${TRAINING_ARGS[@]}"
  --data-path "$PREPROCESSED_DATA/captions"
  --train-iters 80
  --lr 3e-3
  --lr-warmup-iters 10
)
FULL_ARGS=(
  "${TRAINING_ARGS[@]}"
  --data-path 3 "$PREPROCESSED_DATA/instructions" 1 "$PREPROCESSED_DATA/captions"
  --train-iters 600
  --lr 1e-3
  --lr-warmup-iters 30
  --eval-interval 250
)

phase data --inputs examples/nlvr examples/common/questions.py examples/common/llava_json.py \
  "$NLVR_PATH/dev/dev.json" "$NLVR_PATH/test/test.json" --output "$DATA" -- \
  python -m examples.nlvr.prepare_nlvr --nlvr "$NLVR_PATH" --output "$DATA"

# Asked at the end: the first held-out question, a human's sentence.
read_first() { python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())[sys.argv[2]])' "$@"; }
QUESTION=$(read_first "$DATA/heldout_questions.jsonl" text)
QUESTION_IMAGE=$IMAGES/$(read_first "$DATA/heldout_questions.jsonl" image)
run_recipe
