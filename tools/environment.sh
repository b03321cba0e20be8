# Makes the project's own environment in .venv, once, and activates it. To be sourced from the repository's root.
#
#   EXTRAS   extras of setup.py to install (default: examples)
#   PYTHON   the interpreter to make it with (default: python3)
if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "${PYTHON:-python3} is older than Python 3.11; set PYTHON to a newer one" >&2
  return 1
fi
if [ ! -f .venv/bin/activate ]; then
  echo "making .venv with ${PYTHON:-python3}"
  "${PYTHON:-python3}" -m venv .venv || return 1
fi
# shellcheck disable=SC1091
source .venv/bin/activate
_wanted=$(cat constraints.txt setup.py | cksum | tr -d ' ')-${EXTRAS:-examples}
if [ ! -f ".venv/installed-$_wanted" ]; then
  echo "installing into .venv (a few minutes at first)"
  # torch by its exact version first: a range would let another package pull a second build of it.
  pip install --quiet "$(grep '^torch==' constraints.txt)" || return 1
  pip install --quiet -c constraints.txt -e ".[${EXTRAS:-examples}]" || return 1
  touch ".venv/installed-$_wanted"
fi
unset _wanted
# What DeepSpeed compiles at first use belongs to this environment: two environments would compile over each other.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
