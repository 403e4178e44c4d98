# The scripts in this folder source this file: Python and its packages, options, the launch, the log, the final block.
# A script calls `launch`. Options that are unknown here go to Python unchanged.

set -u -o pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CALLED_FROM=$PWD

say() { echo "$@" 2>/dev/null || :; }  # the reader may have gone
die() { printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2; exit 2; }

# The folder for logs, results and .venv: the project's, or the user's cache if that is read-only.
HOME=${HOME:-$(echo ~)} HOME_FOLDER=$ROOT
if [ ! -w "$ROOT" ]; then
    HOME_FOLDER=${XDG_CACHE_HOME:-$HOME/.cache}/beit
    { [[ $HOME_FOLDER = /* ]] && mkdir -p "$HOME_FOLDER" && [ -w "$HOME_FOLDER" ]; } 2>/dev/null \
        || die "$ROOT is read-only, and $HOME_FOLDER cannot be written to; set XDG_CACHE_HOME=/another/folder"
fi

# The header comment of the calling script is its help.
show_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

# ---- Python

PACKAGES="torch torchvision timm einops numpy scipy PIL sklearn tensorboardX"

# has_packages PYTHON MODULE…: PYTHON has all modules, and its torchvision fits its torch.
has_packages() {
    local python=$1; shift
    "$python" -c 'import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))' "$@" 2>/dev/null \
        && TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$python" -c 'import numpy, torch, torchvision
torch.from_numpy(numpy.zeros(1))' 2>/dev/null
}

# reason_against PYTHON: which packages it lacks, or that they do not go together.
reason_against() {
    # shellcheck disable=SC2086
    "$1" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
print("lacks " + ", ".join(missing) if missing else "has a torch, torchvision and numpy that do not go together")' \
        $PACKAGES
}

# install FILE: pip-install a requirements file into $VENV, once for each of its versions.
install() {
    installed "$1" && return
    local constraint=()
    [ ! -f "$VENV/constraints.txt" ] || constraint=(-c "$VENV/constraints.txt")
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off ${constraint[@]+"${constraint[@]}"} \
        -r "$1" 2>&1 | tee -a "$VENV/install.log" | show_progress && cp "$1" "$(stamp "$1")"
}

# show_progress: print the newest line of standard input every five seconds, after the seconds since the start; at the
# end, pip's last error.
show_progress() {
    local line='' newest='' printed='' error='' began=$SECONDS shown=$SECONDS status
    while :; do
        IFS= read -r -t 5 line; status=$?
        case $line in "ERROR: pip's dependency resolver"*) ;; ERROR:*) error=$line ;; esac
        if [ $status = 0 ]; then newest=$line; elif [ $status -le 128 ]; then break; fi  # above: nothing came in time
        if [ $((SECONDS - shown)) -ge 5 ]; then
            [ "$newest" != "$printed" ] || newest='installing …'
            printf '  %3d s: %.66s\n' $((SECONDS - began)) "$newest"
            shown=$SECONDS printed=$newest
        fi
    done
    cat >/dev/null  # bash 3 gives the same status for the end and for silence
    [ -z "$error" ] || say "$error" >&2
}

# made_line: what the installation made, and where.
made_line() {
    "$VENV/bin/python" -c 'import importlib.metadata, platform, sys
versions = ["%s %s" % (name, importlib.metadata.version(name)) for name in ("torch", "torchvision", "timm")]
print("Made %s: Python %s, %s" % (sys.argv[1], platform.python_version(), ", ".join(versions)))' "$VENV" 2>/dev/null \
        || say "Made $VENV"
    say "Use it for other commands: $VENV/bin/python run_class_finetuning.py …"
}

installed() { [ -x "$VENV/bin/python" ] && cmp -s "$1" "$(stamp "$1")"; }

# stamp FILE: the copy that marks an installed requirements file; two of these files have the same name.
stamp() {
    case $1 in
        */tests/*) echo "$VENV/installed-test.txt" ;;
        */requirements-extra.txt) echo "$VENV/installed-extra.txt" ;;
        *) echo "$VENV/installed.txt" ;;
    esac
}

# keep_torch BASE TORCH: make a $VENV that sees the packages of the Python BASE and keeps its torch, for example the one
# for an Ascend machine's torch_npu. BASE may be in a virtual environment.
keep_torch() {
    start_venv
    "$1" -m venv --system-site-packages "$VENV" 2>/dev/null || return
    echo "torch==$2" >"$VENV/constraints.txt"
    "$1" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix: print(sysconfig.get_paths()["purelib"])' \
        >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/parent.pth"
    # shellcheck disable=SC2086
    install "$REQUIREMENTS" || return
    has_packages "$VENV/bin/python" $PACKAGES && return
    # PyTorch before 2.3 needs NumPy 1, which pip does not know.
    "$VENV/bin/python" -m pip install --quiet 'numpy<2' >>"$VENV/install.log" 2>&1
    has_packages "$VENV/bin/python" $PACKAGES
}

# start_venv: mark $VENV as made by the scripts; they may make it again after an interruption.
start_venv() { mkdir -p "$VENV" && : >"$VENV/install.log"; }

# lock_venv PYTHON: hold the lock of $VENV until `exec 8>&-`; wait until no other script installs packages there.
lock_venv() {
    local lock='import fcntl, sys
try:
    fcntl.flock(8, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1:] else 0))
except OSError as error:  # of another kind if the file system has no locks
    sys.exit(isinstance(error, BlockingIOError))'
    { : >>"$VENV.lock"; } 2>/dev/null || die "cannot write $VENV.lock; name a Python that has the packages with PYTHON="
    exec 8>>"$VENV.lock"
    "$1" -c "$lock" try && return
    say "Waiting for another script, which installs packages into $VENV"
    "$1" -c "$lock" 2>/dev/null
}

# need_venv BASE: let $VENV have the packages of $REQUIREMENTS; make it if it is missing.
need_venv() {
    if [ -e "$VENV/bin/python" ] && ! "$VENV/bin/python" -c '' 2>/dev/null; then
        die "$VENV/bin/python cannot be executed; remove $VENV, or name another Python with PYTHON="
    fi
    installed "$REQUIREMENTS" && return
    lock_venv "$1"
    if installed "$REQUIREMENTS"; then :
    elif [ -f "$VENV/install.log" ] || ! { [ -e "$VENV" ] || [ -L "$VENV" ]; }; then make_venv "$1"
    elif ! has_packages "$VENV/bin/python" $PACKAGES; then  # a user's
        die "$VENV $(reason_against "$VENV/bin/python" 2>/dev/null || echo has no Python), and the scripts did not make" \
            "it; run: $VENV/bin/python -m pip install -r $REQUIREMENTS, or name another Python with PYTHON="
    fi
    exec 8>&-
}

# make_venv BASE: make $VENV from the Python BASE, with the packages of $REQUIREMENTS, or install newer ones there.
make_venv() {
    local torch reason
    if [ -f "$VENV/installed.txt" ]; then
        say "Installing $(basename "$REQUIREMENTS"), which has changed, into $VENV"
        install "$REQUIREMENTS" || die "pip could not install $(basename "$REQUIREMENTS"); see $VENV/install.log," \
            "or remove $VENV to make it again"
        return
    fi
    say "Installing $(basename "$REQUIREMENTS") into $VENV, once; this takes a few minutes ($1 lacks packages)"
    torch=$("$1" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)
    rm -rf "$VENV" 2>/dev/null || die "$VENV cannot be replaced; remove it, or name another Python with PYTHON="
    if [ -n "$torch" ] && [ -z "$LOWEST" ]; then
        keep_torch "$1" "$torch" && { made_line; return; }
        say "The torch $torch of $1 does not go with $(basename "$REQUIREMENTS"); installing another torch"
        rm -rf "$VENV"
    fi
    start_venv
    reason=$("$1" -m venv "$VENV" 2>&1) || die "$1 cannot make a virtual environment at $VENV" \
        "($(tail -n 1 <<<"$reason")); install its venv module (apt-get install python3-venv) where it has none," \
        "or name another Python with PYTHON="
    [ -z "$LOWEST" ] || lowest_versions >"$VENV/constraints.txt"
    install "$REQUIREMENTS" || die "pip could not install $(basename "$REQUIREMENTS"); see $VENV/install.log," \
        "or name a Python that has the packages with PYTHON="
    made_line
}

VENV=$HOME_FOLDER/.venv REQUIREMENTS=$ROOT/requirements.txt LOWEST=

# choose_python [MODULE…]: set PYTHON to the first one with the packages: $PYTHON, python3, .venv.
choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        case $PYTHON in /*) ;; */*) PYTHON=$CALLED_FROM/$PYTHON ;; esac
        "$PYTHON" -c '' 2>/dev/null \
            || die "PYTHON=$PYTHON: $([ -e "$PYTHON" ] && echo it cannot be executed || echo no such program)"
        # shellcheck disable=SC2086
        has_packages "$PYTHON" $PACKAGES || die "PYTHON=$PYTHON $(reason_against "$PYTHON");" \
            "run: $PYTHON -m pip install -r $ROOT/requirements.txt, or leave PYTHON= out"
        return
    fi
    local base
    base=$(command -v python3 || command -v python) || die "there is no python3 on the PATH; install Python 3.9 to 3.13"
    # shellcheck disable=SC2086
    if has_packages "$base" $PACKAGES "$@"; then PYTHON=$base; return; fi
    PYTHON=$VENV/bin/python
    need_venv "$base"
}

# choose_stack 1.5|1.8|2.1: set PYTHON to a virtual environment of that PyTorch; make it if it is missing.
choose_stack() {
    local base
    VENV=$HOME_FOLDER/.venv-$1 PYTHON=$HOME_FOLDER/.venv-$1/bin/python
    case $1 in
        1.5|1.8) REQUIREMENTS=$ROOT/$1_requirements.txt ;;
        2.1) LOWEST=yes ;;
        *) die "--stack=$1: there are 1.5, 1.8 and 2.1, and without the option the current one" ;;
    esac
    installed "$REQUIREMENTS" && return
    if [ "$1" = 2.1 ]; then
        base=$(find_python 3.11 3.10 3.9) || die "--stack=2.1 needs Python 3.9 to 3.11, and none was found on the PATH or in pyenv"
    else
        base=$(find_python38) || die "--stack=$1 needs Python 3.8, and none was found on the PATH or in pyenv; name it with PYTHON38="
    fi
    need_venv "$base"
}

# pip's constraints for the lowest versions of PyTorch and its companions that requirements.txt allows.
lowest_versions() {
    sed -nE 's/^(torch|torchvision|timm|einops)>=([0-9.]+),.*/\1==\2.*/p' "$ROOT/requirements.txt"
    echo 'numpy<2'  # PyTorch before 2.3 needs NumPy 1, which pip does not know
}

find_python38() {
    if [ -n "${PYTHON38:-}" ] && "$PYTHON38" -c '' 2>/dev/null; then command -v "$PYTHON38"; else find_python 3.8; fi
}

# find_python VERSION…: the first that works, on the PATH (where a pyenv shim may not work) or in pyenv.
find_python() {
    local version candidate
    for version; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/"python$version" \
            "$(pyenv root 2>/dev/null)"/versions/"$version"*/bin/"python$version"; do
            if "$candidate" -c '' 2>/dev/null; then command -v "$candidate"; return; fi
        done
    done
    return 1
}

has_module() { "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1" 2>/dev/null; }

# ---- options

# The values of --key=value and --key value. FLAGS collects the rest of the command line, for Python.
data_path= eval_data_path= log_dir= finetune= resume= nb_classes= batch_size=64 epochs=30 device=auto nproc_per_node=
output_dir= model= recipe= nnodes=1 node_rank=0 master_addr= master_port= max_restarts=
OPTIONS=" data_path eval_data_path log_dir finetune resume nb_classes batch_size epochs device nproc_per_node output_dir \
model recipe nnodes node_rank master_addr master_port max_restarts "
GIVEN=" "
FLAGS=()

parse_options() {
    local arg key
    while [ $# -gt 0 ]; do
        arg=$1; shift
        case $arg in
            -h|--help) show_help 2>/dev/null || die "the help cannot be printed: standard output fails"; exit 0 ;;
            ----*) arg=${arg#--} ;;  # the seed's README writes ----nproc_per_node
        esac
        key=${arg%%=*}; key=${key#--}; key=${key//-/_}
        case $OPTIONS in
            *" $key "*)
                case $arg in
                    --*=*) printf -v "$key" %s "${arg#*=}" ;;
                    --*) [ $# -gt 0 ] || die "--$key needs a value, as in --$key=VALUE"; printf -v "$key" %s "$1"; shift ;;
                    *) FLAGS+=("$arg"); continue ;;
                esac
                GIVEN+="$key " ;;
            *) FLAGS+=("$arg") ;;
        esac
    done
}

given() { case $GIVEN in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# flag_given NAME: whether the flags for Python include it, in any spelling.
flag_given() {
    local flag
    for flag in ${FLAGS[@]+"${FLAGS[@]}"}; do
        flag=${flag%%=*}; flag=${flag#--}
        [ "${flag//-/_}" != "$1" ] || return 0
    done
    return 1
}

whole_number() {
    case ${!1} in ''|*[!0-9]*|0) die "--$1 must be a whole number from 1 on, got '${!1}'" ;; esac
    printf -v "$1" %d "$((10#${!1}))"  # 08 is no octal number
}

# A path is relative to the folder that the script was called in, or, if it does not exist there, to the root.
from_here() {
    case $1 in
        ''|/*|demo|*://*|hf-hub:*) printf %s "$1" ;;
        beit_*_pt*|beitv2_*_pt*) if [ -e "$CALLED_FROM/$1" ]; then printf %s "$CALLED_FROM/$1"; else printf %s "$1"; fi ;;
        '~/'*) printf %s "$HOME/${1#??}" ;;
        *) if [ -e "$CALLED_FROM/$1" ]; then printf %s "$CALLED_FROM/$1"
            elif [ -e "$ROOT/$1" ]; then printf %s "$1"
            elif [ -e "$HOME_FOLDER/$1" ]; then printf %s "$HOME_FOLDER/$1"
            else printf %s "$CALLED_FROM/$1"; fi ;;
    esac
}

# ---- presets: a recipe of recipes/, or the hyper-parameters of the digits demo; the user's flags override them

DIGITS_MODEL=(--input_size=32 --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value=0 --init_scale=1)
DIGITS=(--lr=2e-3 --layer_decay=1 --drop_path=0 --hflip=0 --aa=none --color_jitter=0 --reprob=0
    --num_workers=0 --save_ckpt_freq=20)

# ---- logs

# open_logs NAME CASE: choose LOG, RESULT and SUMMARY. This run and its processes hold a lock on LOG. If another run
# holds it, the names of all three end in -2, -3 …
open_logs() {
    local number=1 suffix=
    while :; do
        LOG=$LOG_DIR/$1$suffix.log RESULT=$LOG_DIR/.$1$suffix.json CASE=$2$suffix SUMMARY=$LOG_DIR/$2$suffix.log
        { : >>"$LOG"; } 2>/dev/null || die "cannot write $LOG"
        exec 9>>"$LOG"
        "$PYTHON" -c 'import errno, fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:  # of another kind where the file system has no locks
    sys.exit(error.errno == errno.EWOULDBLOCK)' && break
        number=$((number + 1)) suffix=-$number
    done
    rm -f "$RESULT"
    [ $number = 1 ] || say "Another run is writing $LOG_DIR/$1.log; the log of this one is $LOG"
}

# keep_earlier FILE…: copy an earlier run's files to names with their date. LOG keeps its inode, and the lock.
keep_earlier() {
    local file aside moved=
    for file in "$@"; do
        [ -s "$file" ] || continue
        aside=${file%.log}-$(date -r "$file" +%Y%m%d-%H%M%S)
        while [ -e "$aside.log" ]; do aside=$aside-2; done
        cp -p "$file" "$aside.log" || die "cannot keep $file as $aside.log; is the disk full?"
        if [ "$file" = "$LOG" ]; then : >"$file"; else rm "$file"; fi
        moved+=" $(basename "$aside.log")"
    done
    [ -z "$moved" ] || say "Kept the earlier run's logs in $LOG_DIR as$moved"
}

# figures: model, images_per_second, step_milliseconds, accuracy and loss of this run's summary.json; missing ones are
# n/a.
figures() {
    "$PYTHON" -c 'import json, sys
figures = json.load(open(sys.argv[1], encoding="utf-8"))
print(figures.get("model") or sys.argv[2], *("n/a" if figures.get(name) is None else "%.*f" % (digits, figures[name]) for name, digits in
        (("images_per_second", 2), ("step_milliseconds", 3), ("accuracy", 3), ("loss", 4))))' "$RESULT" "$model"
}

final_block() {
    local network fps milliseconds accuracy loss
    read -r network fps milliseconds accuracy loss < <(figures)
    cat <<END 2>/dev/null || echo "$(basename "$0"): standard output fails; the result is in ${SUMMARY:-$LOG}" >&2
------------------ Final result ------------------
Final Performance images/sec : $fps
Final Train Accuracy : $accuracy
E2E Training Duration sec : $1
END
    cat >"$SUMMARY" <<END
Network = $network
RankSize = $RANK_SIZE
BatchSize = $batch_size
DeviceType = $(uname -m)
CaseName = $CASE
ActualFPS = $fps
TrainingTime = $milliseconds
TrainAccuracy = $accuracy
ActualLoss = $loss
E2ETrainingTime = $1
END
}

# ---- the launch

# If the reader of the output ends early, as head does, or its disk is full, tee still completes the log.
TEE=(tee -i)
if tee -ip /dev/null </dev/null 2>/dev/null; then TEE=(tee -ip); fi

# launch KIND DEVICES "$@": KIND is full, performance or eval; the arguments are the user's.
launch() {
    local kind=$1 started status how preset=() suffix log
    nproc_per_node=$2; shift 2
    trap '' PIPE
    parse_options "$@"

    [ -n "$data_path" ] || { [ "$kind" = eval ] && [ -n "$eval_data_path" ]; } \
        || die "--data_path is missing${*:+ (given: $*)}; give the folder that holds train/ and val/, or the word demo"
    local name
    for name in data_path eval_data_path finetune resume; do printf -v "$name" %s "$(from_here "${!name}")"; done
    for name in output_dir log_dir; do
        case ${!name} in ''|/*) ;; *) printf -v "$name" %s "$CALLED_FROM/${!name}" ;; esac
    done
    cd "$ROOT" || exit 2
    [ -z "$data_path" ] || [ "$data_path" = demo ] || [ -d "$data_path" ] \
        || case $data_path in *.zip|*.tar|*.zip/*|*.tar/*) ;; *) die "--data_path $data_path: no such folder" ;; esac
    [ -z "$resume" ] || [ -e "$resume" ] || flag_given auto_resume \
        || case $resume in *://*|hf-hub:*|beit_*_pt*|beitv2_*_pt*) ;; *) die "--resume $resume: no such file or folder" ;; esac
    [ "$kind" != eval ] || [ -n "$resume$finetune" ] \
        || die "--resume is missing; give the checkpoint to evaluate, or the folder that holds it"
    for name in batch_size epochs nproc_per_node nnodes; do whole_number $name; done
    case $node_rank in *[!0-9]*|'') die "--node_rank must be a whole number from 0 on, got '$node_rank'" ;; esac
    [ "$node_rank" -lt "$nnodes" ] || die "--node_rank $node_rank: with --nnodes $nnodes it goes from 0 to $((nnodes - 1))"
    [ -z "$master_port" ] || whole_number master_port
    [ "${master_port:-1}" -le 65535 ] || die "--master_port $master_port: a port is from 1 to 65535"
    [ "$nnodes" = 1 ] || { [ -n "$master_addr" ] && [ -n "$master_port" ]; } \
        || die "--nnodes $nnodes needs --master_addr and --master_port, those of node 0, the same on every machine"
    RANK_SIZE=$((nproc_per_node * nnodes))

    [ "$HOME_FOLDER" = "$ROOT" ] || say "$ROOT is read-only; logs and results go to $HOME_FOLDER"
    check_flags
    choose_python
    if [ "$device" = auto ]; then
        # torch_npu cannot be imported before CANN is set up, so no NPU is found.
        # shellcheck source=/dev/null
        if has_module torch_npu; then source "$ROOT/test/env_npu.sh" || exit 2; fi
        device=$("$PYTHON" -c 'import sys
from beit.devices import accelerator
device = accelerator.find_device("auto")
print(device.type)
sys.stderr.write(accelerator.npu_unused_reason("auto", device))') || exit 2
    fi
    # shellcheck source=/dev/null
    case $device in npu*) source "$ROOT/test/env_npu.sh" || exit 2 ;; esac
    set_preset "$kind"

    case $kind in full) suffix=acc log=train_0 ;; performance) suffix=perf log=train_0_perf ;; eval) suffix=eval log=train_0_eval ;; esac
    [ "$node_rank" = 0 ] || log=${log}_node$node_rank
    LOG_DIR=$HOME_FOLDER/test/output/0
    mkdir -p "$LOG_DIR" || die "cannot make $LOG_DIR"
    open_logs "$log" "${model}_bs${batch_size}_${RANK_SIZE}p_$suffix"
    [ "$node_rank" = 0 ] || SUMMARY=
    if [ "$kind" = eval ] || { [ -z "$resume" ] && ! flag_given auto_resume; }; then  # else the log continues, like the run
        keep_earlier "$LOG" "$SUMMARY"
    fi

    started=$SECONDS
    BEIT_SUMMARY=$RESULT run_logged
    status=$?
    if [ "$status" -ne 0 ]; then
        rm -f "$RESULT"
        case $status in 129|130|138|143) how=stopped ;; *) how=failed ;; esac
        echo "$(basename "$0"): $how with exit status $status; the log is $LOG" >&2
        exit "$status"
    fi
    if [ "$node_rank" != 0 ]; then
        say "Finished; the result is printed and logged on node 0"
    elif [ ! -s "$RESULT" ]; then
        say "Finished without a new result: there was nothing left to train, or it was a profiling run"
    else
        final_block $((SECONDS - started))
    fi
    rm -f "$RESULT"
}

# check_flags: refuse the user's mistyped flags before packages are installed, or PyTorch is imported.
check_flags() {
    local message
    message=$("${PYTHON:-python3}" -c 'import sys
import flags
from beit.errors import UserError
parser = flags.build_parser()
parser.logs = False
try:
    parser.parse_args(sys.argv[1:])
except UserError as error:
    print(error)
    sys.exit(2)' ${FLAGS[@]+"${FLAGS[@]}"} 2>/dev/null)
    [ $? != 2 ] || [ -z "$message" ] || die "$message"
}

# set_preset KIND: complete the options and fill ARGUMENTS, the presets first so that the user's flags win.
set_preset() {
    local digits= name bs length warmup=5 weights=
    [ "$data_path" != demo ] || digits=yes
    [ -z "$recipe" ] || { [ -z "$digits" ] && [ "$kind" != eval ]; } \
        || die "--recipe $recipe: it belongs to training on real data; leave it out"
    if [ -n "$digits" ]; then
        [ -n "$model" ] || model=beit_nano_patch8_32
        preset=("${DIGITS_MODEL[@]}" "${DIGITS[@]}")
        given epochs || epochs=40
        # One thread: more help such a small model little, and are slow beside other programs.
        case $device in cpu) export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;; esac
    elif [ "$kind" = eval ]; then
        [ -n "$model" ] || model=beit_base_patch16_224
    else
        read -r recipe name weights bs length warmup < <("$PYTHON" -m beit.recipes "$model" "$finetune" "$recipe")
        [ -n "$weights" ] || exit 2
        [ -n "$model" ] || model=$name
        preset=("--recipe=$recipe")
        given batch_size || batch_size=$bs
        given epochs || epochs=$length
        case $device in npu*|cuda*) preset+=(--amp --opt-level=O2 --loss_scale=128) ;; esac
        case $device in npu*) preset+=(--opt=npufusedadamw) ;; esac
    fi
    if [ "$kind" = eval ]; then  # the checkpoint describes the model
        preset=(--eval)
        [ -z "$digits" ] || preset+=(--num_workers=0)
    fi
    # A run that the user makes as short as the warm-up warms up for half of it.
    preset+=("--warmup_epochs=$((epochs > warmup ? warmup : epochs / 2))")
    case $kind in
        full) given output_dir || output_dir=${HOME_FOLDER/#"$ROOT"/.}/train_result ;;
        performance) preset+=(--maxstep=50 --disable_eval_during_finetuning --no_save_ckpt) ;;
    esac
    if [ "$kind" != eval ] && ! given finetune && [ -z "$digits$resume" ]; then
        finetune=./checkpoints/$weights.pth
        if [ "$kind" = performance ] && [ ! -f "$finetune" ]; then
            say "$finetune does not exist; measuring with random weights, which take the same time"
            finetune=
        fi
    fi
    [ "$RANK_SIZE" = 1 ] || preset+=(--dist_eval)
    ARGUMENTS=("--data_path=$data_path" "--batch_size=$batch_size" "--epochs=$epochs" "--device=$device"
        "--output_dir=$output_dir" "${preset[@]}")
    if [ "$kind" != eval ] || given model; then ARGUMENTS+=("--model=$model"); fi
    [ -z "$finetune$recipe" ] || ARGUMENTS+=("--finetune=$finetune")  # empty: not the recipe's either
    [ -z "$resume" ] || ARGUMENTS+=("--resume=$resume")
    [ -z "$nb_classes" ] || ARGUMENTS+=("--nb_classes=$nb_classes")
    [ -z "$eval_data_path" ] || ARGUMENTS+=("--eval_data_path=$eval_data_path")
    [ -z "$log_dir" ] || ARGUMENTS+=("--log_dir=$log_dir")
    ARGUMENTS+=(${FLAGS[@]+"${FLAGS[@]}"})
}

# run_logged: run and write the log, in the background, where bash can pass signals on.
run_logged() {
    local run signalled status
    set -m  # a separate process group, in which SIGINT works
    if [ -t 1 ] && { BEIT_TERMINAL=$(tty <&4); } 4>&1 && [ "${TERM:-dumb}" != dumb ] && has_module tqdm; then
        # On a terminal, Python draws a bar and shows the lines for people; the log gets every line.
        export BEIT_TERMINAL
        run_python </dev/null 2>&1 >>"$LOG" | keep_log >&2 &
    else
        run_python </dev/null 2>&1 | keep_log &
    fi
    set +m
    run=$(jobs -p %%)
    trap 'signalled=yes; kill -INT -- "-$run" 2>/dev/null' INT
    trap 'signalled=yes; kill -TERM "$run" 2>/dev/null' TERM HUP  # Python ends its processes; tee writes to the end
    while :; do
        signalled=
        { wait %%; } 2>/dev/null  # without bash's message about a killed process
        status=$?
        [ -n "$signalled" ] || break
    done
    trap - INT TERM HUP
    return $status
}

# keep_log: copy standard input to the log and to standard output; a failure does not change the status of the run.
keep_log() { trap '' INT; "${TEE[@]}" -a "$LOG" || :; }

run_python() {
    if [ "$RANK_SIZE" = 1 ]; then
        exec "$PYTHON" -u run_class_finetuning.py "${ARGUMENTS[@]}"
    fi
    local cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}  # torchrun's is 1
    local where=("--nproc_per_node=$nproc_per_node" "--nnodes=$nnodes" "--node_rank=$node_rank") name
    for name in master_addr master_port max_restarts; do [ -z "${!name}" ] || where+=("--$name=${!name}"); done
    exec "$PYTHON" -u -m beit.distributed.launcher "${where[@]}" run_class_finetuning.py "${ARGUMENTS[@]}"
}
