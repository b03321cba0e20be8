# The road from LLaVA JSON to an evaluated model, shared by the examples. To be sourced from the repository's root, in an
# activated environment, by a script that has set the variables below and has made the data.
#
#   RUN             folder of the whole run
#   DATA            folder with captions.json, instructions.json, texts.json and heldout_*.json(l)
#   IMAGES          folder that the image paths start from
#   DATA_PHASE      name of the phase that made DATA
#   VISION_TEACHER_DATA    flags of train_vision_teacher that name its captions and their image folder
#   NUM_PROCESSES   ranks that train
#   QUESTION, QUESTION_IMAGE    asked at the end
#   TOKENIZER_ARGS, VISION_TEACHER_ARGS, LANGUAGE_MODEL_ARGS    flags of the scripts in examples/common
#   MODEL_ARGS      flags that name the model and how it sees images
#   STAGE1_ARGS, ALIGN_ARGS, FULL_ARGS    flags of the three trainings, blends of data included

# phase NAME [--after ...] [--inputs ...] [--output ...] -- COMMAND: run it, unless it is done already.
phase() {
  python -m examples.common.run_phase --run "$RUN" --name "$@"
}

# in_parallel PHASE PHASE: two shell functions at a time; fails if one does.
in_parallel() {
  # Both in the background: a function behind `||` would go on after a failed command.
  "$1" &
  local first=$!
  "$2" &
  local second=$!
  wait "$first"
  wait "$second"
}

make_tokenizer() {
  phase tokenizer --after "$DATA_PHASE" --inputs examples/common/train_tokenizer.py --output "$RUN/tokenizer" -- \
    python -m examples.common.train_tokenizer --input "$DATA/captions.json" "$DATA/instructions.json" \
    --output "$RUN/tokenizer" "${TOKENIZER_ARGS[@]}"
}

CHAT_TEMPLATE=examples/common/brief.jinja
TEACHER_INPUTS=("$CHAT_TEMPLATE" examples/common/samples.py examples/common/teacher_loop.py megatron_haplovl/config/presets.py)

train_vision_teacher() {
  OMP_NUM_THREADS=1 phase vision-teacher --after "$DATA_PHASE" tokenizer \
    --inputs examples/common/train_vision_teacher.py "${TEACHER_INPUTS[@]}" --output "$RUN/teachers/vision" -- \
    python -m examples.common.train_vision_teacher "${VISION_TEACHER_DATA[@]}" --tokenizer-model "$RUN/tokenizer" \
    --output "$RUN/teachers/vision" "${VISION_TEACHER_ARGS[@]}"
}

train_language_model() {
  OMP_NUM_THREADS=1 phase language-model --after "$DATA_PHASE" tokenizer \
    --inputs examples/common/train_language_model.py "${TEACHER_INPUTS[@]}" --output "$RUN/teachers/language" -- \
    python -m examples.common.train_language_model --train "$DATA/texts.json" --heldout "$DATA/heldout_texts.json" \
    --tokenizer-model "$RUN/tokenizer" --output "$RUN/teachers/language" --chat-template "$CHAT_TEMPLATE" "${LANGUAGE_MODEL_ARGS[@]}"
}

# preprocess NAME TEMPLATE: DATA/NAME.json -> RUN/preprocessed/NAME.*
preprocess() {
  phase "preprocess-$1" --after "$DATA_PHASE" tokenizer --inputs megatron_haplovl/data tools/preprocess_data.py -- \
    python tools/preprocess_data.py --input "$DATA/$1.json" --image-folder "$IMAGES" \
    --output-prefix "$RUN/preprocessed/$1" --tokenizer-model "$RUN/tokenizer" --chat-template "$2" --workers 1 \
    "${MODEL_ARGS[@]}"
}

preprocess_images() {
  preprocess instructions "$CHAT_TEMPLATE"
  preprocess heldout_captions plain
}

preprocess_rest() {
  preprocess captions plain
  preprocess texts "$CHAT_TEMPLATE"
  preprocess heldout_instructions "$CHAT_TEMPLATE"
}

PREPROCESSED=(preprocess-{captions,instructions,texts,heldout_captions,heldout_instructions})

# train NAME AFTER SCRIPT FLAGS...: one training, its checkpoints in RUN/NAME and its metrics in RUN/metrics/NAME.jsonl
train() {
  local name=$1 after=$2 script=$3
  shift 3
  # shellcheck disable=SC2086
  phase "$name" --after "${PREPROCESSED[@]}" $after --output "$RUN/$name" "$RUN/metrics/$name.jsonl" -- \
    deepspeed --num_gpus "$NUM_PROCESSES" "$script" "${MODEL_ARGS[@]}" --tokenizer-model "$RUN/tokenizer" \
    --device cpu --save "$RUN/$name" --metrics-file "$RUN/metrics/$name.jsonl" "$@"
}

run_recipe() {
  local hf="$RUN/haplovl-hf" plot="$RUN/losses.png"

  make_tokenizer
  in_parallel train_vision_teacher train_language_model
  in_parallel preprocess_images preprocess_rest

  train stage1 "vision-teacher language-model" pretrain_haplovl.py --vision-teacher "$RUN/teachers/vision" \
    --language-model "$RUN/teachers/language" --valid-data-path "$RUN/preprocessed/heldout_instructions" \
    "${STAGE1_ARGS[@]}"
  train align stage1 finetune_haplovl.py --recipe align --pretrained-checkpoint "$RUN/stage1" \
    --language-model "$RUN/teachers/language" --valid-data-path "$RUN/preprocessed/heldout_captions" "${ALIGN_ARGS[@]}"
  train full align finetune_haplovl.py --recipe full --pretrained-checkpoint "$RUN/align" \
    --valid-data-path "$RUN/preprocessed/heldout_instructions" "${FULL_ARGS[@]}"

  phase export --after full --inputs megatron_haplovl/hf tools/convert_checkpoint.py --output "$hf" -- \
    python tools/convert_checkpoint.py export --load "$RUN/full" --save "$hf" --tokenizer-model "$RUN/tokenizer" \
    --chat-template "$CHAT_TEMPLATE"
  phase evaluate --after export --inputs megatron_haplovl/evaluation tools/evaluate.py --output "$RUN/evaluation.json" -- \
    python tools/evaluate.py --model "$hf" --question-file "$DATA/heldout_questions.jsonl" --image-folder "$IMAGES" \
    --answers-file "$RUN/answers.jsonl" --json "$RUN/evaluation.json" --batch-size 64 --max-new-tokens 8
  phase plot --after full --inputs examples/common/plot_losses.py --output "$plot" -- \
    python -m examples.common.plot_losses --output "$plot" --stage "stage 1=$RUN/metrics/stage1.jsonl" \
    --stage "align=$RUN/metrics/align.jsonl" --stage "full=$RUN/metrics/full.jsonl"

  python -m examples.common.summarize --run "$RUN" --hf-checkpoint "$hf" --plot "$plot"
  echo
  echo "One question about $QUESTION_IMAGE:"
  echo "  $QUESTION"
  local answer
  answer=$(python tools/generate.py --model "$hf" --image "$QUESTION_IMAGE" --prompt "$QUESTION" --device cpu)
  echo "  -> $answer"
}
