#!/usr/bin/env bash
# Check in about five minutes that this program computes correctly on a device, and measure its speed there.
#
#   bash test/check_device.sh
#   bash test/check_device.sh --device=npu --output_dir=report
#
# Options, as --key=value:
#   --device=NAME          auto (the first available of npu, cuda, cpu), npu, cuda or cpu
#   --output_dir=DIR       folder of device_report.json and device_report.html (the current folder)
# Other flags: python benchmarks/check_device.py --help. PYTHON=/path/to/python chooses the Python.
# It needs no data. The exit status is 1 if a check fails.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arguments=("$@")
parse_options "$@"
# Wrong flags first: the search for packages takes seconds.
problem=$("${PYTHON:-python3}" "$ROOT/benchmarks/check_device.py" _flags "$@" 2>&1 >/dev/null) || case $problem in
    'check_device.py: error: '*) echo "$problem" >&2; exit 2 ;;
esac
choose_python
case $device in
    # torch_npu cannot be imported before CANN is set up.
    # shellcheck source=/dev/null
    auto|npu*) if has_module torch_npu; then source "$ROOT/test/env_npu.sh" || exit 2; fi ;;
esac
exec "$PYTHON" -u "$ROOT/benchmarks/check_device.py" ${arguments[@]+"${arguments[@]}"}
