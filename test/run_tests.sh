#!/usr/bin/env bash
# Run the tests, in a Python that it sets up itself where packages are missing.
#
#   bash test/run_tests.sh                everything
#   bash test/run_tests.sh --lint         the linter only
#   bash test/run_tests.sh -k model -x    any of pytest's own options
#
# PYTHON=/path/to/python chooses the Python.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h|--help) show_help; exit 0 ;; esac
cd "$ROOT" || exit 2
choose_python
if ! "$PYTHON" -c 'import pytest' 2>/dev/null || [ "${1:-}" = --lint ]; then
    if [ "$PYTHON" = "$ROOT/.venv/bin/python" ]; then
        install "$ROOT/test/requirements.txt" || die "pip could not install test/requirements.txt; see .venv/install.log"
    fi
fi
if [ "${1:-}" = --lint ]; then
    "$PYTHON" -c 'import ruff' 2>/dev/null || die "$PYTHON has no ruff; run: $PYTHON -m pip install -r test/requirements.txt"
    exec "$PYTHON" -m ruff check .
fi
"$PYTHON" -c 'import pytest' 2>/dev/null || die "$PYTHON has no pytest; run: $PYTHON -m pip install -r test/requirements.txt"
exec "$PYTHON" -m pytest test -q "$@"
