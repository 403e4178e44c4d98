"""The shell scripts, run as a user runs them, in a copy of the repository whose path has a space."""

import contextlib
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers import (
    COLD,
    LOG,
    NANO,
    ROOT,
    TINY,
    Run,
    all_end,
    check_summary,
    copy_checkout,
    environment,
    fails,
    fake_cann,
    has_proc,
    marked,
    output,
    result,
    run_script,
    start_script,
    summary,
    text,
)

pytestmark = pytest.mark.current_only

TRAINING = ('train_full_1p', 'train_full_8p', 'train_performance_1p', 'train_performance_8p')
SCRIPTS = TRAINING + ('train_eval_1p',)
DATED = r'-\d{8}-\d{6}(-\d+)?'


# ---- a checkout to run in, data, a script

def contents(folder):
    """{path in the folder: bytes} of all files."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, 'rb') as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(str(tmp_path / 'my code' / 'beit'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data):
    """(checkout, run) after one epoch of train_full_1p.sh from the root. Tests that change it take `after_training`."""
    folder = copy_checkout(str(tmp_path_factory.mktemp('trained') / 'my code' / 'beit'))
    return folder, run_script(folder, 'train_full_1p', '--data_path=' + data, *TINY)


@pytest.fixture
def after_training(trained, tmp_path):
    """A separate copy of that checkout with the run's files."""
    result(trained[1])
    shutil.copytree(trained[0], str(tmp_path / 'a copy' / 'beit'))
    return str(tmp_path / 'a copy' / 'beit')


# ---- help

@pytest.mark.parametrize('where', ['', 'test'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_readable(checkout, script, where):
    run = run_script(checkout, script, '--data_path=demo', '--help', where=where)
    assert (run.status, run.err) == (0, '')
    lines = run.out.splitlines()
    assert re.match(r'[A-Z].*\.$', lines[0]) and len(lines) > 10
    assert not any(line.startswith('#') or len(line) > 120 or 'source ' in line for line in lines)
    options = ['data_path', 'model', 'batch_size', 'device', 'nproc_per_node']
    options += {'full': ['finetune', 'resume', 'output_dir', 'epochs', 'nb_classes'], 'eval': ['resume', 'nb_classes'],
                'performance': ['finetune', 'maxstep']}[script.split('_')[1]]
    options += ['nnodes', 'node_rank', 'master_addr', 'master_port'] if script.endswith('8p') else []
    for option in options:
        assert '--%s=' % option in run.out, option
    assert 'bash test/%s.sh --data_path=' % script in run.out
    assert run_script(checkout, script, '-h', where=where).out == run.out
    assert not os.path.exists(output(checkout))


# ---- the installation

FAKE_BASE = """#!/usr/bin/env bash
# A Python without torch, whose `-m venv FOLDER` makes one with a slow pip.
case "$*" in *importlib.metadata*) exit 1 ;; esac
mkdir -p "$3/bin"
cat >"$3/bin/python" <<'END'
#!/usr/bin/env bash
case "$*" in
    *importlib.metadata*) echo "Made ${@: -1}: Python 3.11.1, torch 2.1, torchvision 0.2, timm 1.0" ;;
    *) echo Collecting torch; sleep 7; echo Installing collected packages
       if [ "${PIP_STATUS:-0}" != 0 ]; then echo "ERROR: [Errno 28] No space left on device"; exit $PIP_STATUS; fi ;;
esac
END
chmod +x "$3/bin/python"
"""


@pytest.mark.parametrize('status', [0, 1])
def test_an_installation_shows_signs_of_life_and_what_it_made(tmp_path, checkout, status):
    base = tmp_path / 'base'
    base.write_text(FAKE_BASE)
    base.chmod(0o755)
    done = subprocess.run(['bash', '-c', 'source test/common.sh; make_venv "$0"', str(base)], cwd=checkout,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env=environment(PIP_STATUS=str(status)))
    venv = os.path.join(checkout, '.venv')
    head, *signs, made, use = done.stdout.splitlines() + ['', ''] * status
    assert head.startswith('Installing requirements.txt into ' + venv)
    assert len(signs) == 1 and re.match(r'  +[5-7] s: Collecting torch$', signs[0])
    assert text(os.path.join(venv, 'install.log')).startswith('Collecting torch\nInstalling collected packages\n')
    if status:
        assert done.returncode == 2
        assert done.stderr.startswith('ERROR: [Errno 28] No space left on device\n')
        assert 'pip could not install requirements.txt; see %s/install.log' % venv in done.stderr
        return
    assert (done.returncode, done.stderr) == (0, '')
    assert made == 'Made %s: Python 3.11.1, torch 2.1, torchvision 0.2, timm 1.0' % venv
    assert '%s/bin/python run_class_finetuning.py' % venv in use


@pytest.mark.parametrize('found, status, words', [
    ('lacks packages', 2, ('lacks torch', 'did not make it', 'pip install -r', 'PYTHON=')),
    ('has packages', 0, ()), ('dangling', 2, ('has no Python',)), ('made, older requirements', 0, ('has changed',)),
    ('made, interrupted', 0, ('Made ',))])
def test_what_the_scripts_did_not_make_is_not_removed(tmp_path, checkout, found, status, words):
    """An environment of the user, or of the scripts with packages that the user added, keeps its files."""
    base, venv = tmp_path / 'base', tmp_path / 'venv'
    base.write_text(FAKE_BASE.replace('sleep 7;', '').replace('case "$*" in\n    ', 'case "$*" in\n    '
                    '*find_spec*"not all"*|*torch.from_numpy*|*fcntl*) exit ${PACKAGES_STATUS:-0} ;;\n    '
                    '*find_spec*) echo lacks torch; exit ;;\n    ', 1))
    base.chmod(0o755)
    subprocess.run([str(base), '-m', 'venv', str(venv)], check=True)
    (venv / 'kept').write_text('')
    if found.startswith('made'):
        (venv / 'install.log').write_text('')
    if 'older' in found:
        (venv / 'installed.txt').write_text('torch')
    link = os.path.join(checkout, '.venv')
    os.symlink(str(venv) if found != 'dangling' else str(tmp_path / 'gone'), link)
    if found == 'made, interrupted':  # what the scripts began is made again
        os.remove(link)
        shutil.copytree(str(venv), link)
    done = subprocess.run(['bash', '-c', 'source test/common.sh; need_venv "$0"', str(base)], cwd=checkout,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env=environment(PACKAGES_STATUS='1' if found == 'lacks packages' else '0'))
    assert done.returncode == status, done.stderr
    assert (venv / 'kept').exists() and (found == 'made, interrupted' or os.path.islink(link))
    assert os.path.exists(os.path.join(link, 'kept')) == (found not in ('dangling', 'made, interrupted'))
    for word in words:
        assert word in done.stdout + done.stderr


# ---- what a script hands to Python, read by a stand-in for it

STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    case $2 in *fcntl*|*json*) exec "$REAL" "$@" ;; esac
    echo cpu; exit
fi
[ "$2" != beit.recipes ] || exec "$REAL" "$@"
printf '%s\\n' "$@" >"$RECORD"
echo "The stand-in ran; CANN: ${FAKE_CANN:-none}"
while [ ! -e "${GATE:-/}" ]; do sleep 0.05; done
echo "Result: images_per_second 2.00 step_milliseconds 3.000 accuracy 4.000 loss 5.0000"  # which is for people
[ -z "${ACCURACY-85.238}" ] || [ "${STATUS:-0}" != 0 ] || cat >"$BEIT_SUMMARY" <<END
{"images_per_second": 1157, "accuracy": ${ACCURACY-85.238}, "loss": 1.23454, "step_milliseconds": 442.52391}
END
exit "${STATUS:-0}"
"""


@pytest.fixture
def stand_in(tmp_path, checkout):
    """stand_in('train_full_1p', …): (run, the arguments for Python)."""
    program, record = tmp_path / 'fake python', tmp_path / 'record'
    program.write_text(STAND_IN)
    program.chmod(0o755)

    def run(script, *flags, **options):
        done = run_script(checkout, script, *flags, **dict(run.env, **options))
        return done, record.read_text().splitlines() if record.exists() else None
    run.env = {'PYTHON': str(program), 'RECORD': str(record), 'REAL': sys.executable}
    return run


def needs(script):
    """The flags that a script requires besides data."""
    return ['--resume=README'] if script == 'train_eval_1p' else []


@pytest.fixture
def weights(checkout):
    """A file for --resume and --finetune in a folder that only the scripts search."""
    for name in ('README', 'checkpoints/beit_base_patch16_224_pt22k_ft22k.pth'):
        os.makedirs(os.path.join(checkout, os.path.dirname(name)), exist_ok=True)
        with open(os.path.join(checkout, name), 'w', encoding='utf-8'):
            pass


@pytest.mark.parametrize('path', ['photos.zip', 'photos.tar', 'photos.zip/inner', 'photos.tar/inner'])
def test_data_may_be_an_archive(stand_in, weights, parse, checkout, tmp_path, path):
    """Relative to the folder that the script is called from; Python says what is wrong with it."""
    run, arguments = stand_in('train_full_1p', '--data_path=' + path, where='test')
    result(run)
    assert parse(*arguments[2:]).data_path == os.path.join(checkout, 'test', path)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_published_hyper_parameters_are_the_defaults(stand_in, weights, parse, data, script):
    run, arguments = stand_in(script, '--data_path=' + data, *needs(script))
    devices = 8 if script.endswith('8p') else 1
    result(run)
    if devices == 8:
        launch = arguments[:arguments.index('run_class_finetuning.py')]
        assert launch[:3] == ['-u', '-m', 'beit.distributed.launcher']
        assert '--nproc_per_node=8' in launch and '--nnodes=1' in launch
        arguments = arguments[arguments.index('run_class_finetuning.py'):]
    else:
        assert arguments[:2] == ['-u', 'run_class_finetuning.py']
        arguments = arguments[1:]
    args = parse(*arguments[1:])
    kind = script.split('_')[1]
    assert (args.data_path, args.model, args.batch_size) == (data, 'beit_base_patch16_224', 64)
    assert (args.epochs, args.warmup_epochs, args.update_freq) == (30, 5, 1)
    if kind == 'eval':  # its checkpoint names its model
        assert args.given == {'data_path', 'batch_size', 'epochs', 'device', 'output_dir', 'eval', 'warmup_epochs',
                              'resume'}
    else:
        assert (args.lr, args.layer_decay, args.drop_path, args.weight_decay) == (2e-5, 0.85, 0.1, 1e-8)
    assert args.eval == (kind == 'eval')
    assert args.maxstep == (50 if kind == 'performance' else 0)
    assert args.output_dir == ('./train_result' if kind == 'full' else '')
    assert args.finetune == ('' if kind == 'eval' else './checkpoints/beit_base_patch16_224_pt22k_ft22k.pth')


def test_the_final_block_and_the_summary_have_the_exact_lines(stand_in, weights, checkout, data):
    run, _ = stand_in('train_full_8p', '--data_path=' + data)
    assert run.out.splitlines()[-4:-1] == [
        '------------------ Final result ------------------', 'Final Performance images/sec : 1157.00',
        'Final Train Accuracy : 85.238']
    seconds = result(run)['seconds']
    assert text(output(checkout, 'beit_base_patch16_224_bs64_8p_acc.log')) == (
        'Network = beit_base_patch16_224\nRankSize = 8\nBatchSize = 64\nDeviceType = %s\n'
        'CaseName = beit_base_patch16_224_bs64_8p_acc\nActualFPS = 1157.00\nTrainingTime = 442.524\n'
        'TrainAccuracy = 85.238\nActualLoss = 1.2345\nE2ETrainingTime = %s\n' % (platform.machine(), seconds))


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_way_to_write_an_option_arrives(stand_in, weights, parse, data, script):
    run, arguments = stand_in(
        script, '--data_path', data, '----nproc_per_node=2', '--batch-size', '16', '--opt-level=O1',
        '--smoothing', '0.2', '--layer_decay=0.5', '--opt_betas', '0.8', '0.9',
        '--model_prefix=two  words $HOME *', '--amp', *needs(script))
    result(run)
    assert '--nproc_per_node=2' in arguments[:arguments.index('run_class_finetuning.py')]
    args = parse(*arguments[arguments.index('run_class_finetuning.py') + 1:])
    assert (args.data_path, args.batch_size, args.opt_level, args.smoothing) == (data, 16, 'O1', 0.2)
    assert (args.layer_decay, args.opt_betas, args.amp) == (0.5, [0.8, 0.9], True)
    assert args.model_prefix == 'two  words $HOME *'
    assert args.dist_eval


def test_more_than_one_machine(stand_in, weights, checkout, data):
    run, arguments = stand_in('train_full_8p', '--data_path=' + data, '--nnodes=2', '--node_rank', '0',
                              '--master_addr=10.0.0.1', '--master_port=29501')
    result(run)
    assert {'--nproc_per_node=8', '--nnodes=2', '--node_rank=0', '--master_addr=10.0.0.1', '--master_port=29501'} \
        <= set(arguments[:arguments.index('run_class_finetuning.py')])
    assert summary(checkout, 'beit_base_patch16_224_bs64_16p_acc')['RankSize'] == '16'


def test_on_an_npu_the_presets_are_the_adaptation_s_and_cann_is_found(stand_in, weights, parse, data, tmp_path):
    info = fake_cann(tmp_path, 'ascend-toolkit')
    run, arguments = stand_in('train_full_1p', '--data_path=' + data, '--device=npu', ASCEND_INSTALL_INFO=info)
    result(run)
    assert 'CANN: ascend-toolkit' in run.out
    args = parse(*arguments[2:])
    assert (args.amp, args.opt_level, args.loss_scale, args.opt) == (True, 'O2', 128, 'npufusedadamw')


@pytest.mark.parametrize('where', ['', 'test'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_failing_run_is_a_failing_script(stand_in, weights, checkout, data, script, where):
    resume = ['--resume=' + os.path.join(checkout, 'README')] if needs(script) else []
    run, _ = stand_in(script, '--data_path=' + data, *resume, where=where, STATUS='7')
    assert run.status == 7
    assert 'The stand-in ran' in run.out and 'Final result' not in run.out
    assert 'failed with exit status 7; the log is ' + output(checkout) in run.err
    assert os.listdir(output(checkout)) == [LOG[script.split('_')[1]] + '.log']  # a failed run has no summary


@pytest.mark.parametrize('figure, shown', [('null', 'n/a'), ('7e-5', '0.000')])
def test_a_figure_that_a_run_does_not_have(stand_in, weights, checkout, data, figure, shown):
    run, _ = stand_in('train_full_1p', '--data_path=' + data, ACCURACY=figure)
    assert result(run)['accuracy'] == shown == summary(checkout, 'beit_base_patch16_224_bs64_1p_acc')['TrainAccuracy']


def test_a_run_without_a_result_shows_none(stand_in, weights, checkout, data):
    result(stand_in('train_full_1p', '--data_path=' + data)[0])
    run, _ = stand_in('train_full_1p', '--data_path=' + data, '--auto_resume', ACCURACY='')
    assert run.status == 0 and 'Finished without a new result' in run.out and 'Final result' not in run.out
    assert os.listdir(output(checkout)) and not [name for name in os.listdir(output(checkout)) if name[0] == '.']


# ---- two scripts at once in one checkout

@contextlib.contextmanager
def waiting(checkout, env, gate, *flags, **more):
    """A script whose run waits until `gate` exists."""
    process = start_script(checkout, 'train_full_1p', *flags, **dict(env, GATE=str(gate), **more))
    try:
        assert any('The stand-in ran' in line for line in process.stdout)
        yield process
    finally:
        gate.write_text('')
        process.kill()
        process.communicate()


@pytest.mark.parametrize('flags', [[], ['--auto_resume']])
def test_two_scripts_at_once_have_separate_logs_and_results(stand_in, weights, checkout, data, tmp_path, flags):
    logs, case, gate = output(checkout), 'beit_base_patch16_224_bs64_1p_acc', tmp_path / 'gate'
    with waiting(checkout, stand_in.env, gate, '--data_path=' + data, ACCURACY='11.111', FAKE_CANN='one') as first:
        second, _ = stand_in('train_full_1p', '--data_path=' + data, *flags, ACCURACY='22.222', FAKE_CANN='two')
        assert result(second)['accuracy'] == '22.222'
        said, = [line for line in second.out.splitlines() if line.startswith('Another run ')]
        assert os.path.join(logs, 'train_0.log') in said and os.path.join(logs, 'train_0-2.log') in said
        gate.write_text('')
        out, err = first.communicate(timeout=60)
    assert result(Run(first.returncode, out, err))['accuracy'] == '11.111'
    assert sorted(os.listdir(logs)) == sorted(['train_0.log', 'train_0-2.log', case + '.log', case + '-2.log'])
    for number, mine, accuracy in (('', 'one', '11.111'), ('-2', 'two', '22.222')):
        assert re.findall('CANN: (.*)', text(os.path.join(logs, 'train_0%s.log' % number))) == [mine]
        assert summary(checkout, case + number)['TrainAccuracy'] == accuracy
    third, _ = stand_in('train_full_1p', '--data_path=' + data)  # now the first name is free, and its log stays
    assert 'Another run ' not in third.out and "Kept the earlier run's logs" in third.out
    assert len(os.listdir(logs)) == 6 and text(os.path.join(logs, 'train_0-2.log'))


def test_a_log_belongs_to_a_run_whose_script_was_killed(stand_in, weights, checkout, data, tmp_path):
    with waiting(checkout, stand_in.env, tmp_path / 'gate', '--data_path=' + data) as first:
        first.kill()
        first.wait()  # its run continues and writes
        assert 'Another run ' in stand_in('train_full_1p', '--data_path=' + data)[0].out
    until = time.monotonic() + 20
    while 'Result: ' not in text(output(checkout, 'train_0.log')) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    assert 'Another run ' not in stand_in('train_full_1p', '--data_path=' + data)[0].out


@has_proc
def test_two_scripts_do_not_share_an_output_folder(checkout, data):
    real = {'PYTHON': sys.executable}  # it inherits the lock of the log
    first = start_script(checkout, 'train_full_1p', '--data_path=' + data, *TINY, '--epochs=100000', MARK=checkout,
                         **real)
    try:
        assert any('Epoch: [1]' in line for line in first.stdout)
        logged = text(output(checkout, 'train_0.log'))
        run = run_script(checkout, 'train_full_1p', '--data_path=' + data, *TINY, **real)
        fails(run, '--output_dir ', 'train_result: process ', ' writes there')
        assert output(checkout, 'train_0-2.log') in run.err
        assert text(output(checkout, 'train_0.log')).startswith(logged)
        assert not glob.glob(os.path.join(checkout, 'train_result-*'))
    finally:
        first.kill()
        for pid in marked(checkout):
            os.kill(pid, signal.SIGKILL)


# ---- errors that the scripts detect themselves

@pytest.mark.parametrize('where', ['', 'test'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_a_mistake_ends_in_one_line_and_status_2(checkout, data, tmp_path, script, where):
    for flags, expected in (
            ([], '--data_path is missing'),
            (['--data_path=/no/such folder'], '--data_path /no/such folder: no such folder'),
            (['--data_path'], '--data_path needs a value'),
            (['--data_path=' + data, '--resume=' + str(tmp_path / 'nothing')], '/nothing: no such file or folder'),
            (['--data_path=' + data, '--resume=' + data, '--batch_size=many'], "--batch_size must be a whole number"),
            (['--data_path=' + data, '--resume=' + data, '--nproc_per_node=0'], '--nproc_per_node must be'),
            (['--data_path=' + data, '--resume=' + data, '--nnodes=2'], '--nnodes 2 needs --master_addr and'),
            (['--data_path=' + data, '--resume=' + data, '--nnodes=2', '--node_rank=2'], 'goes from 0 to 1'),
            (['--data_path=' + data, '--resume=' + data, '--node_rank=-1'], '--node_rank must be'),
            (['--data_path=' + data, '--resume=' + data, '--master_port=70000'], '--master_port 70000')):
        run = run_script(checkout, script, *flags, where=where)
        fails(run, script + '.sh: error: ', expected)
        assert run.out == ''
    assert not os.path.exists(output(checkout))


@pytest.mark.parametrize('script, env, expected', [
    ('train_eval_1p', {}, '--resume is missing'),
    ('train_full_1p', {'PYTHON': '/no/such/python'}, 'PYTHON=/no/such/python: no such program')])
def test_a_missing_checkpoint_or_python(checkout, data, script, env, expected):
    fails(run_script(checkout, script, '--data_path=' + data, **env), expected)


# ---- real runs on one device

def test_full_1p_trains_and_evaluates(trained):
    checkout, run = trained
    figures = check_summary(checkout, 'train_full_1p', run, batch_size=4, devices=1)
    log = text(output(checkout, 'train_0.log'))
    assert log in run.out  # the output equals the log
    assert 'Epoch: [0]  [7/8]' in log
    assert 'Max accuracy: %s%%' % figures['TrainAccuracy'] in log
    assert set(os.listdir(os.path.join(checkout, 'train_result'))) \
        == {'checkpoint-0.pth', 'checkpoint-best.pth', 'log.txt', 'args.yaml', 'summary.json'}
    epoch = json.loads(text(os.path.join(checkout, 'train_result', 'log.txt')))
    assert '%.3f' % epoch['test_acc1'] == figures['TrainAccuracy']
    assert '%.4f' % epoch['train_loss'] == figures['ActualLoss']
    assert not glob.glob(os.path.join(checkout, '*' + '-2*'))


def test_a_new_run_moves_the_earlier_one_to_a_backup(after_training, data):
    logs, results = output(after_training), os.path.join(after_training, 'train_result')
    case = 'beit_nano_patch8_32_bs4_1p_acc'
    before = contents(logs), contents(results)
    assert set(before[0]) == {'train_0.log', case + '.log'} and 'checkpoint-best.pth' in before[1]

    spaced = [part for flag in TINY for part in flag.split('=', 1)]  # every option in its other spelling
    run = run_script(after_training, 'train_full_1p', '--data_path', data, *spaced, '--maxstep', '2',
                     '--output_dir', '../train_result', where='test')
    check_summary(after_training, 'train_full_1p', run, batch_size=4, devices=1)

    names = set(os.listdir(logs)) - set(before[0])
    assert len(names) == 2
    for name, content in before[0].items():
        moved, = [other for other in names if re.match(name[:-4] + DATED + r'\.log$', other)]
        assert contents(logs)[moved] == content
    folder, = glob.glob(results + '-*')
    assert re.match(r'train_result' + DATED + '$', os.path.basename(folder))
    assert contents(folder) == before[1]
    kept, moved = [line for line in run.out.splitlines() if 'earlier run' in line]
    assert all(name in kept for name in names) and os.path.basename(folder) in moved
    assert len(text(os.path.join(results, 'log.txt')).splitlines()) == 1


def test_resume_continues_in_the_same_folder(after_training, data):
    logs, results = output(after_training), os.path.join(after_training, 'train_result')
    log, epochs = text(os.path.join(logs, 'train_0.log')), text(os.path.join(results, 'log.txt'))
    first = contents(results)['checkpoint-0.pth']
    run = run_script(after_training, 'train_full_1p', '--data_path=' + data, '--resume=./train_result', *TINY,
                     '--epochs=2', '--smoothing', '0.2', '--clip_grad=1.5')
    check_summary(after_training, 'train_full_1p', run, batch_size=4, devices=1)
    assert '--smoothing=0.2' in run.out and '--clip_grad=1.5' in run.out
    assert 'Epoch: [1]' in run.out and 'Epoch: [0]' not in run.out and 'earlier run' not in run.out
    grown = text(os.path.join(logs, 'train_0.log'))
    assert grown.startswith(log) and 'Epoch: [1]' in grown[len(log):]
    lines = text(os.path.join(results, 'log.txt'))
    assert lines.startswith(epochs) and [json.loads(line)['epoch'] for line in lines.splitlines()] == [0, 1]
    assert contents(results)['checkpoint-0.pth'] == first
    assert not glob.glob(results + '-*')
    assert set(os.listdir(logs)) == {'train_0.log', 'beit_nano_patch8_32_bs4_1p_acc.log'}


@pytest.mark.parametrize('where, resume', [('', 'train_result/checkpoint-best.pth'), ('test', './train_result'),
                                           ('test', '../train_result')])
def test_evaluation_gives_the_accuracy_of_the_training(after_training, trained, data, where, resume):
    before = contents(os.path.join(after_training, 'train_result'))
    shutil.copytree(os.path.join(data, 'val'), os.path.join(after_training, 'only val', 'val'))
    folder = '../only val' if where else 'only val'  # relative to where the script is called
    run = run_script(after_training, 'train_eval_1p', '--data_path=' + folder, '--resume=' + resume, *NANO,
                     '--batch_size=4', where=where)
    check_summary(after_training, 'train_eval_1p', run, batch_size=4, devices=1)
    assert result(run)['accuracy'] == result(trained[1])['accuracy']
    assert 'Accuracy of the network on the 22 test images: %s%%' % result(run)['accuracy'] in run.out
    assert contents(os.path.join(after_training, 'train_result')) == before


def test_performance_1p_measures_50_steps(checkout, data):
    run = run_script(checkout, 'train_performance_1p', '--data_path=' + data, *TINY, '--epochs=7')
    check_summary(checkout, 'train_performance_1p', run, batch_size=4, devices=1)
    assert 'Epoch: [5]  [7/8]' in run.out and 'Epoch: [6]  [1/2]' in run.out  # 6 * 8 + 2
    assert 'Test:' not in run.out and not os.path.exists(os.path.join(checkout, 'train_result'))


def test_performance_1p_from_test_with_accumulation(after_training, data):
    """One step is one micro-step of batch_size images; files of an earlier training don't change."""
    before = contents(os.path.join(after_training, 'train_result'))
    run = run_script(after_training, 'train_performance_1p', '--data_path=' + data, *TINY, '--maxstep=3',
                     '--update_freq=2', where='test')
    check_summary(after_training, 'train_performance_1p', run, batch_size=4, devices=1)
    assert 'Epoch: [0]  [5/6]' in run.out
    assert contents(os.path.join(after_training, 'train_result')) == before
    assert 'earlier run' not in run.out


def test_paths_for_python_are_relative_to_the_calling_folder(checkout, data):
    """--eval_data_path and --data_path are both in test/, where the script is called."""
    shutil.copytree(data, os.path.join(checkout, 'test', 'my data'))
    run = run_script(checkout, 'train_full_1p', '--data_path=my data/train', '--eval_data_path=my data/val',
                     '--data_set=image_folder', '--output_dir=my result', *TINY, '--maxstep=2', where='test')
    check_summary(checkout, 'train_full_1p', run, batch_size=4, devices=1)
    assert os.path.isfile(os.path.join(checkout, 'test', 'my result', 'checkpoint-best.pth'))


@pytest.mark.parametrize('script, flags, expected', [
    ('train_full_1p', ['--nb_classes=7'], '--nb_classes 7'),
    ('train_performance_1p', ['--maxsteps=3'], '--maxstep'),
    ('train_full_8p', ['--nproc_per_node=2', '--epoch=3'], '--epochs'),
    ('train_performance_8p', ['--nproc_per_node=2', '--master_port=0'], '--master_port'),
    ('train_eval_1p', ['--resume=./train_result', '--abs_pos_emb'], 'pos_embed')])
def test_a_mistake_that_python_finds_loses_nothing(after_training, data, script, flags, expected):
    results = os.path.join(after_training, 'train_result')
    before, logs = contents(results), set(contents(output(after_training)).values())
    fails(run_script(after_training, script, '--data_path=' + data, *(TINY + flags)), expected)
    assert contents(results) == before
    assert not glob.glob(results + '-*')
    assert logs <= set(contents(output(after_training)).values())


# ---- several processes

@pytest.mark.parametrize('script, where, flags', [
    ('train_full_8p', '', ['----nproc_per_node=2']),
    ('train_full_8p', 'test', ['--nproc_per_node', '2', '--maxstep=3']),
    ('train_performance_8p', '', ['--nproc_per_node=2', '--maxstep=6']),
    ('train_performance_8p', 'test', ['--nproc_per_node=2', '--maxstep=2', '--update_freq=2'])])
def test_the_8p_scripts_over_gloo(checkout, data, script, where, flags):
    run = run_script(checkout, script, '--data_path=' + data, *(TINY + flags), where=where)
    check_summary(checkout, script, run, batch_size=4, devices=2)
    assert 'Device: cpu, ' in run.out and '2 processes' in run.out
    assert run.out.count('Result: ') == 1
    if script == 'train_full_8p':
        assert 'on the 22 test images' in run.out  # each once, though they are shared
        assert os.path.isfile(os.path.join(checkout, 'train_result', 'checkpoint-best.pth'))


@has_proc
@pytest.mark.parametrize('damaged', ['003.png', '004.png'])
def test_one_process_that_fails_ends_the_run(checkout, image_folder, damaged):
    """Only one of the two processes reads a damaged image; the other loses its connection without output."""
    folder = image_folder()
    with open(os.path.join(folder, 'train', 'cat', damaged), 'wb') as file:
        file.write(b'no image')
    run = run_script(checkout, 'train_full_8p', '--data_path=' + folder, *TINY, '--nproc_per_node=2', MARK=folder)
    assert run.status == 2, run.out + run.err
    assert run.out.count(damaged + ': cannot be read as an image') == 1
    assert 'Traceback' not in run.out + run.err
    assert 'Final result' not in run.out
    assert not os.path.exists(output(checkout, 'beit_nano_patch8_32_bs4_2p_acc.log'))
    assert all_end(folder)


@has_proc
def test_one_process_that_is_killed_ends_the_run(checkout, data, tmp_path):
    script = start_script(checkout, 'train_performance_8p', '--data_path=' + data, *TINY, '--nproc_per_node=2',
                          '--epochs=100000', '--maxstep=400000', MARK=str(tmp_path), **COLD)
    try:
        assert any('Epoch: [2]' in line for line in script.stdout)
        second, = [pid for pid, env in marked(str(tmp_path)).items() if env.get('RANK') == '1']
        os.kill(second, signal.SIGKILL)
        out, err = script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode > 0
    assert 'failed with exit status %d' % script.returncode in err
    assert 'Final result' not in out
    assert all_end(str(tmp_path))


@has_proc
@pytest.mark.parametrize('script, number, status', [('train_performance_1p', signal.SIGTERM, 143),
                                                    ('train_performance_8p', signal.SIGTERM, 143),
                                                    ('train_performance_1p', signal.SIGHUP, 143),
                                                    ('train_performance_8p', signal.SIGINT, 130)])
def test_a_script_that_is_stopped_stops_its_processes(checkout, data, tmp_path, script, number, status):
    flags = TINY + (['--nproc_per_node=2'] if '8p' in script else [])
    run = start_script(checkout, script, '--data_path=' + data, *flags, '--epochs=100000', '--maxstep=400000',
                       MARK=str(tmp_path), **COLD)
    try:
        assert any('Epoch: [2]' in line for line in run.stdout)
        run.send_signal(number)  # only to the shell, as kill, docker stop or a scheduler does
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == status, err
    assert 'stopped with exit status %d' % status in err
    assert 'Final result' not in out and 'Traceback' not in out + err
    assert 'stopped by %s after update ' % ('SIGINT' if number == signal.SIGINT else 'SIGTERM') in out
    assert all_end(str(tmp_path))


# ---- env_npu.sh

def source_env_npu(**env):
    """(status, {name: value}, standard error) after `source test/env_npu.sh` in a strict shell."""
    clean = {name: value for name, value in environment().items() if not name.startswith(('ASCEND', 'HCCL', 'TASK_'))}
    done = subprocess.run(['bash', '-c', 'set -u; source "$0" && env -0', os.path.join(ROOT, 'test', 'env_npu.sh')],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env=dict(clean, **env))
    return done.returncode, dict(entry.partition('=')[::2] for entry in done.stdout.split('\0')), done.stderr


@pytest.mark.parametrize('package', ['ascend-toolkit', 'nnae', 'cann'])
@pytest.mark.parametrize('recorded', [True, False])
def test_env_npu_finds_cann(tmp_path, package, recorded):
    """In the folder that its installer recorded, or in the usual one."""
    info = fake_cann(tmp_path, package)
    where = {'ASCEND_INSTALL_INFO': info} if recorded else {
        'ASCEND_INSTALL_INFO': '/nowhere', 'ASCEND_FOLDER': str(tmp_path / 'opt' / 'my Ascend')}
    status, env, errors = source_env_npu(**where)
    assert (status, errors) == (0, '')
    assert (env['FAKE_CANN'], env['TASK_QUEUE_ENABLE']) == (package, '1')
    assert 120 <= int(env['HCCL_CONNECT_TIMEOUT']) <= 7200


def test_env_npu_prefers_the_toolkit_to_nnae(tmp_path):
    fake_cann(tmp_path, 'nnae')
    assert source_env_npu(ASCEND_INSTALL_INFO=fake_cann(tmp_path, 'ascend-toolkit'))[1]['FAKE_CANN'] == 'ascend-toolkit'


@pytest.mark.parametrize('ending', ['/nnae\n', '\r\n'], ids=['path of the package', 'Windows line end'])
def test_env_npu_reads_the_installers_file(tmp_path, ending):
    info = fake_cann(tmp_path, 'nnae')
    with open(info, 'w', encoding='utf-8', newline='') as file:
        file.write('Install_Path=%s%s' % (tmp_path / 'opt' / 'my Ascend', ending))
    assert source_env_npu(ASCEND_INSTALL_INFO=info)[1]['FAKE_CANN'] == 'nnae'


def test_env_npu_keeps_variables_that_are_set(tmp_path):
    info = fake_cann(tmp_path, 'ascend-toolkit')
    status, env, errors = source_env_npu(ASCEND_INSTALL_INFO=info, ASCEND_HOME_PATH=str(tmp_path),
                                         HCCL_CONNECT_TIMEOUT='1200')
    assert (status, errors) == (0, '')
    assert (env['ASCEND_HOME_PATH'], env['HCCL_CONNECT_TIMEOUT']) == (str(tmp_path), '1200')
    assert 'FAKE_CANN' not in env
    assert source_env_npu(ASCEND_INSTALL_INFO=info, ASCEND_HOME_PATH='/gone')[1]['FAKE_CANN'] == 'ascend-toolkit'


@pytest.mark.parametrize('options', ['u', 'eu', ''])
def test_env_npu_leaves_the_shells_options(tmp_path, options):
    done = subprocess.run(
        ['bash', '-c', 'set -%s; source "$0"; echo "$-"' % (options or '-'), os.path.join(ROOT, 'test', 'env_npu.sh')],
        stdout=subprocess.PIPE, universal_newlines=True, check=True,
        env=environment(ASCEND_INSTALL_INFO=fake_cann(tmp_path, 'cann'), ASCEND_HOME_PATH=''))
    assert ('u' in done.stdout, 'e' in done.stdout) == ('u' in options, 'e' in options)


def test_env_npu_in_another_shell_is_an_error(tmp_path):
    done = subprocess.run(['sh', '-c', '. "$0"; echo status $?', os.path.join(ROOT, 'test', 'env_npu.sh')],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert 'status 2' in done.stdout and 'this shell is not bash' in done.stderr or 'status 0' in done.stdout


def test_env_npu_without_cann_warns_in_one_line(tmp_path):
    status, env, errors = source_env_npu(ASCEND_INSTALL_INFO=str(tmp_path / 'none'), ASCEND_FOLDER=str(tmp_path))
    assert status == 0 and 'HCCL_CONNECT_TIMEOUT' in env
    assert len(errors.splitlines()) == 1 and 'found no CANN' in errors and 'set_env.sh' in errors


def test_env_npu_keeps_compiled_operators(tmp_path):
    info = fake_cann(tmp_path, 'cann')
    env = source_env_npu(ASCEND_INSTALL_INFO=info, XDG_CACHE_HOME=str(tmp_path / 'cache'))[1]
    assert env['ACL_OP_COMPILER_CACHE_MODE'] == 'enable' and os.path.isdir(env['ACL_OP_COMPILER_CACHE_DIR'])
    assert env['ACL_OP_COMPILER_CACHE_DIR'].startswith(str(tmp_path / 'cache'))
    (tmp_path / 'file').write_text('')
    status, env, _ = source_env_npu(ASCEND_INSTALL_INFO=info, XDG_CACHE_HOME=str(tmp_path / 'file'))
    assert status == 0 and 'ACL_OP_COMPILER_CACHE_DIR' not in env


@pytest.mark.parametrize('there', [False, True])
def test_env_npu_with_and_without_msnpureport(tmp_path, there):
    """Without it there is no message; a failing one, or one without the necessary rights, stops nothing."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in ('bash', 'sed', 'tail', 'tr', 'env', 'mkdir'):
        os.symlink(shutil.which(name), str(folder / name))
    if there:
        (folder / 'msnpureport').write_text('#!/bin/sh\necho permission denied >&2\nexit 1\n')
        (folder / 'msnpureport').chmod(0o755)
    status, env, errors = source_env_npu(ASCEND_INSTALL_INFO=fake_cann(tmp_path, 'cann'), PATH=str(folder))
    assert (status, errors, env['FAKE_CANN']) == (0, '', 'cann')
