#!/usr/bin/env bash
# All that a change must pass, in this order. `make check`, continuous integration and the commit hook start this script,
# so that the list exists once.
#
#   bash tests/check.sh             format, lint, types, import contract, tests
#   bash tests/check.sh --full      with the slow tests
#   bash tests/check.sh --static    without any test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export EXTRAS=test,dev
source tools/environment.sh
ruff format --check .
ruff check .
mypy
lint-imports
if [ "${1:-}" != "--static" ]; then
  exec bash tests/run.sh "$@"
fi
