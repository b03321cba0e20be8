#!/usr/bin/env bash
# Train a small HaploVL on NLVR through both stages and measure it on held-out pictures, on a CPU.
#
#   bash examples/nlvr/train_nlvr.sh NLVR_PATH
#
# NLVR_PATH is the folder `nlvr` of a clone of https://github.com/lil-lab/nlvr, the one that holds dev/ and test/.
# Everything lands in runs/nlvr. A second call keeps every phase that is done; delete the folder to start anew.
# Flags behind it go to examples/nlvr/recipe.py; --dry-run prints every command and starts none.
#
#   NUM_PROCESSES=N   ranks that train (default: 2)
#   PRECISION=bf16|fp32    number format (default: the one that is faster on this machine)
set -euo pipefail
NLVR_PATH=$(cd "${1:?usage: bash examples/nlvr/train_nlvr.sh NLVR_PATH}" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
exec python -m examples.nlvr.recipe "$NLVR_PATH" \
  --num-processes "${NUM_PROCESSES:-2}" --precision "${PRECISION:-auto}" "$@"
