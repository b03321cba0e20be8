#!/usr/bin/env bash
# Makes the environment and runs the tests.
#
#   bash tests/run.sh            the test suite
#   bash tests/run.sh --full     with the slow matrices
#   bash tests/run.sh tests/unit/model -k mask      anything else goes to pytest
#
# TEST_PROCESSES=1 runs one test file after the other instead of two at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=(-m "not slow")
if [ "${1:-}" = "--full" ]; then
  selection=()
  shift
fi
# Two files at a time: most of a test is imports and waiting. A few tests are not worth a second process.
if [ $# -eq 0 ]; then
  selection+=(-n "${TEST_PROCESSES:-2}" --dist loadfile)
fi
EXTRAS="${EXTRAS:-test}" source tools/environment.sh
# A run that was killed while it compiled leaves a lock behind, for which the next one would wait for ever.
if [ -d "$TORCH_EXTENSIONS_DIR" ]; then
  find "$TORCH_EXTENSIONS_DIR" -name lock -delete
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "${selection[@]}" "$@"
