# Sourced by the scripts where the device is an NPU, and by hand before calling Python there: source test/env_npu.sh
# Finds CANN and runs its own environment script, then sets what suits this program. Values set before stay.

[ -n "${BASH_VERSION:-}" ] || { echo "env_npu.sh: this shell is not bash; run bash, and source it there" >&2; return 2; }
_install_info=${ASCEND_INSTALL_INFO:-/etc/Ascend/ascend_cann_install.info}
_cann=
_unset_variables=${-//[^u]/}  # whether the caller wants an error for them; CANN's script doesn't
if [ ! -d "${ASCEND_HOME_PATH:-}" ]; then
    if [ -r "$_install_info" ]; then
        _cann=$(sed -n 's/^Install_Path=//p' "$_install_info" | tail -n 1 | tr -d '\r')
    fi
    # Install_Path is Ascend's folder or, for some packages, the toolkit's own. Newer CANN has a folder called cann.
    for _script in "$_cann"/{ascend-toolkit,nnae,cann}/set_env.sh "$_cann/set_env.sh" \
        "${ASCEND_FOLDER:-/usr/local/Ascend}"/{ascend-toolkit,nnae,cann}/set_env.sh; do
        case $_cann$_script in /ascend-toolkit/*|/nnae/*|/cann/*|/set_env.sh) continue ;; esac  # no Install_Path
        if [ -r "$_script" ]; then
            # shellcheck source=/dev/null
            set +u; source "$_script"; [ -z "$_unset_variables" ] || set -u
            break
        fi
    done
    [ -d "${ASCEND_HOME_PATH:-${ASCEND_TOOLKIT_HOME:-}}" ] \
        || echo "env_npu.sh: found no CANN (looked in $_install_info and ${ASCEND_FOLDER:-/usr/local/Ascend}); if" \
            "torch_npu cannot be imported, run: source <CANN's folder>/set_env.sh" >&2
fi
unset _install_info _cann _script _unset_variables

export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}        # seconds to wait for the other processes (120-7200)
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}                # the host queues operators ahead of the device
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}                # processes keep to cores near their device
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export ACL_OP_COMPILER_CACHE_MODE=${ACL_OP_COMPILER_CACHE_MODE:-enable}  # operators are compiled once, not each run
export ACL_OP_COMPILER_CACHE_DIR=${ACL_OP_COMPILER_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/ascend_operators}
mkdir -p "$ACL_OP_COMPILER_CACHE_DIR" 2>/dev/null || unset ACL_OP_COMPILER_CACHE_DIR
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}    # errors only
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}

# Device logs to errors only, where the tool exists.
if command -v msnpureport >/dev/null 2>&1; then
    for _device in /dev/davinci[0-9]*; do
        [ -e "$_device" ] && msnpureport -g error -d "${_device#/dev/davinci}" >/dev/null 2>&1
    done
    unset _device
fi
true
