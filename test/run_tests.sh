#!/usr/bin/env bash
# Run the tests; install missing packages into .venv.
#
#   bash test/run_tests.sh                everything, on the current PyTorch
#   bash test/run_tests.sh --stack=1.8    everything, on PyTorch 1.8 or 1.5 with Python 3.8, or on 2.1, the lowest that
#                                         requirements.txt allows, with Python 3.9 to 3.11
#   bash test/run_tests.sh --soak         everything, with 500 kills in test_faults.py instead of 50, and a new Python for
#                                         each start of the program; with --stack too
#   bash test/run_tests.sh --fast         the unit tests that find most mistakes, in two minutes on two cores
#   bash test/run_tests.sh --ci           what .ci/run runs on the current PyTorch: everything
#   bash test/run_tests.sh --stack=1.5 --ci   on 1.5, without the files marked current_only, which do not depend on Python
#                                         and PyTorch, and without BEiT base's run
#   bash test/run_tests.sh --stack=1.8 --ci   on 1.8, the files marked computes: the rest runs the same code as on 1.5,
#                                         with the same Python 3.8
#   bash test/run_tests.sh --lint         the linter, and mypy, with the settings of pyproject.toml
#   bash test/run_tests.sh -k model -x    pytest's options; or files such as tests/test_model.py instead of all
#
# PYTHON=/path/to/python chooses the Python; PYTHON38= the one for --stack, if it is not found.
#
# Tests that cannot run on this machine are skipped, with the reason. MUST_RUN names the needs whose tests must run:
#   compiler   g++, to build the NPU emulator       emulator   a PyTorch for it, 2.6 or newer
#   openssl    to make a certificate
#   stacks     the virtual environments of --stack=1.5 and --stack=1.8, to exchange files with the current PyTorch
#              (STACKS=/path/to/python:/path/to/python names others)
#   registry   the package registry, for the published torch_npu
#   linux      /proc, for processes                    netns, tmpfs   the right to make network namespaces, to mount
#   current    features of the current PyTorch, timm, torchvision, Pillow: bfloat16, torch.compile, fused kernels …
#   extras     the packages of requirements-extra.txt   browser        Chromium, for the report
#   cuda       a GPU                                    soak           the long tests, with --soak
#   MUST_RUN="compiler openssl stacks" bash test/run_tests.sh
# The tests run on up to four cores at once; -n 0 runs one test at a time.
# With --stack the tests across the three stacks do not run: the run on the current PyTorch has them. Only the current
# stack gets the packages of requirements-extra.txt.
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
        || die "PYTHON=$PYTHON has no $tool; run: $PYTHON -m pip install -r $ROOT/tests/requirements.txt"
    lock_venv "$PYTHON"
    install "$ROOT/tests/requirements.txt" || die "pip could not install tests/requirements.txt; see $VENV/install.log"
fi
if [ $tool = ruff ]; then
    "$PYTHON" -m ruff check . || exit
    exec "$PYTHON" -m mypy
fi
if [ ${#extras[@]} != 0 ] && [ "$PYTHON" = "$VENV/bin/python" ]; then
    lock_venv "$PYTHON"
    install "$ROOT/requirements-extra.txt" \
        || echo "pip could not install requirements-extra.txt (see $VENV/install.log); tests that need it do not run" >&2
fi
{ exec 8>&-; } 2>/dev/null
# The test files are distributed among the cores; their models are too small for threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
workers=()
if [ "$cores" -gt 1 ] && has_module xdist; then workers=(-n "$((cores < 4 ? cores : 4))" --dist loadfile); fi
exec "$PYTHON" -m pytest ${what[@]+"${what[@]}"} -q ${workers[@]+"${workers[@]}"} ${left_out[@]+"${left_out[@]}"} ${others[@]+"${others[@]}"}
