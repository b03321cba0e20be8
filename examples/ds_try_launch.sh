#!/usr/bin/env bash
# A few steps of haplovl-debug on mock data: do the machines find each other, does this layout run? Before a long run.
#
#   NUM_GPUS=8 bash examples/ds_try_launch.sh --tensor-model-parallel-size 2 --sequence-parallel --zero-stage 3
#
# Flags go to finetune_haplovl.py and win over the recipe.
# examples/common/launch.sh has the variables that choose machines and launcher (docs/launching.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/common/launch.sh
source examples/common/launch.sh

MODEL_ARGS=(--config "${RECIPE:-examples/recipes/haplovl-debug/try_launch.yaml}")

launch finetune_haplovl.py "${MODEL_ARGS[@]}" "$@"
