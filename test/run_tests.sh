#!/usr/bin/env bash
# Run the tests, in a Python that it sets up itself where packages are missing.
#
#   bash test/run_tests.sh                everything, on the current PyTorch
#   bash test/run_tests.sh --stack=1.8    everything, on PyTorch 1.8 (or 1.5), in a Python 3.8 of its own; 2.1 is the
#                                         lowest that requirements.txt allows, in a Python 3.9 to 3.11
#   bash test/run_tests.sh --soak         everything, with 500 kills in test_faults.py instead of 50, and each start of
#                                         the program by a Python of its own; with --stack too
#   bash test/run_tests.sh --fast         the unit tests that find most mistakes, in two minutes on two cores
#   bash test/run_tests.sh --ci           what .ci/run runs on the current PyTorch: everything
#   bash test/run_tests.sh --stack=1.5 --ci   on 1.5, without the files that are marked current_only: there neither
#                                         Python nor PyTorch makes a difference; and without BEiT base's run
#   bash test/run_tests.sh --stack=1.8 --ci   on 1.8, the files that are marked computes: the rest, kills and hostile
#                                         files among it, goes the same ways as on 1.5, with the same Python 3.8
#   bash test/run_tests.sh --lint         the linter, and mypy, with the settings of pyproject.toml
#   bash test/run_tests.sh -k model -x    any of pytest's own options; or files, tests/test_model.py, in place of all
#
# PYTHON=/path/to/python chooses the Python; PYTHON38= the one for --stack, where it isn't found by itself.
#
# A test that can't run on this machine is skipped, and says so. MUST_RUN names the needs whose tests must run, or fail:
#   compiler   g++, to build the NPU emulator       emulator   a PyTorch that it works with, 2.6 or newer
#   openssl    to make a certificate
#   stacks     the virtual environments of --stack=1.5 and --stack=1.8, whose files the current PyTorch reads and they
#              its own (STACKS=/path/to/python:/path/to/python names others)
#   registry   the package registry, for the published torch_npu
#   linux      what Linux tells of processes           netns, tmpfs   the right to make network namespaces, to mount
#   current    what the current PyTorch, timm, torchvision and Pillow have: bfloat16, torch.compile, fused kernels …
#   extras     the packages of requirements-extra.txt   browser        a Chromium, which opens the report
#   cuda       a GPU                                    soak           the long ones, with --soak
#   MUST_RUN="compiler openssl stacks" bash test/run_tests.sh
# The tests run on up to four cores at once; -n 0 runs them one after the other.
# With --stack the tests across the three stacks are left out: the current PyTorch's run holds them for all. Only the
# current stack gets the packages of requirements-extra.txt.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
tool=pytest
left_out=() what=(tests) others=() marks='' ci='' stack=''
for each; do
    case $each in
        -h|--help) show_help; exit 0 ;;
        --lint) tool=ruff ;;
        --soak) export BEIT_SOAK=1 ;;
        --fast) marks="fast and not slow" ;;
        --ci) ci=yes ;;
        --stack=*) stack=${each#*=}; choose_stack "$stack"; left_out=(--deselect tests/test_stacks.py::test_across_) ;;
        tests/*.py*) what=(); others+=("$each") ;;
        *) others+=("$each") ;;
    esac
done
cd "$ROOT" || exit 2
case $ci$stack in yes1.5) marks="not current_only" ;; yes1.8) marks=computes ;; esac
[ -z "$marks" ] || left_out+=(-m "$marks")
extras=()
[ $tool != pytest ] || [ "$VENV" != "$HOME_FOLDER/.venv" ] || extras=(matplotlib tensorboard onnx onnxscript onnxruntime transformers)
choose_python $tool ${extras[@]+"${extras[@]}"}
if ! "$PYTHON" -c "import ${tool/ruff/ruff, mypy}" 2>/dev/null; then
    [ "$PYTHON" = "$VENV/bin/python" ] \
        || die "PYTHON=$PYTHON has no $tool; run: $PYTHON -m pip install -r tests/requirements.txt"
    install "$ROOT/tests/requirements.txt" || die "pip could not install tests/requirements.txt; see $VENV/install.log"
fi
if [ $tool = ruff ]; then
    "$PYTHON" -m ruff check . || exit
    exec "$PYTHON" -m mypy
fi
if [ ${#extras[@]} != 0 ] && [ "$PYTHON" = "$VENV/bin/python" ]; then
    install "$ROOT/requirements-extra.txt" \
        || echo "pip could not install requirements-extra.txt (see $VENV/install.log); what needs it is not tested" >&2
fi
# The files of tests are shared out among the cores; their models are so small that threads would only be in the way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
workers=()
if [ "$cores" -gt 1 ] && has_module xdist; then workers=(-n "$((cores < 4 ? cores : 4))" --dist loadfile); fi
exec "$PYTHON" -m pytest ${what[@]+"${what[@]}"} -q ${workers[@]+"${workers[@]}"} ${left_out[@]+"${left_out[@]}"} ${others[@]+"${others[@]}"}
