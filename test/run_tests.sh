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
if [ "${1:-}" = --lint ]; then tool=ruff; else tool=pytest; fi
choose_python $tool
if ! "$PYTHON" -c "import $tool" 2>/dev/null; then
    [ "$PYTHON" = "$ROOT/.venv/bin/python" ] \
        || die "PYTHON=$PYTHON has no $tool; run: $PYTHON -m pip install -r test/requirements.txt"
    install "$ROOT/test/requirements.txt" || die "pip could not install test/requirements.txt; see .venv/install.log"
fi
if [ $tool = ruff ]; then exec "$PYTHON" -m ruff check .; fi
exec "$PYTHON" -m pytest test -q "$@"
