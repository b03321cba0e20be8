#!/usr/bin/env bash
# Train a small HaploVL through both stages on rendered scenes, export it, measure it and ask it a question, on a CPU.
#
#   bash examples/quickstart.sh
#
# Everything lands in runs/quickstart. A second call keeps every phase that is done; delete the folder to start anew.
# Flags go to examples/quickstart/recipe.py; --dry-run prints every command and starts none.
#
#   NUM_PROCESSES=N   ranks that train (default: 2)
#   PRECISION=bf16|fp32    number format (default: the one that is faster on this machine)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
exec python -m examples.quickstart.recipe \
  --num-processes "${NUM_PROCESSES:-2}" --precision "${PRECISION:-auto}" "$@"
