"""On an unsuitable machine the programs print one line, and none hangs."""

import os
import pwd
import re
import resource
import subprocess
import sys

import pytest

import run_class_finetuning
from helpers import NANO, ROOT, TINY, cannot_run, copy_checkout, environment, lines_of

pytestmark = pytest.mark.current_only
PROGRAMS = ('run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py',
            'run_linear_eval.py')


def run(*command, cwd=ROOT, timeout=120, limit=None, **env):
    def set_limit():
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=timeout, preexec_fn=set_limit, env=environment(OMP_NUM_THREADS='1', **env))


# ---- packages

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    return copy_checkout(str(tmp_path_factory.mktemp('startup') / 'code'))


@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize('flags', [[], ['--help']])
def test_a_python_without_the_packages(program, flags, tmp_path, checkout):
    done = run(sys.executable, '-S', os.path.join(checkout, program), *flags, cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, '')
    line, = done.stderr.splitlines()
    assert line.startswith(program + ': error: ')
    for name in ('torch', 'torchvision', 'timm', 'einops', 'numpy', 'Pillow'):
        assert name in line
    assert line.endswith('run: %s -m pip install -r %s' % (sys.executable, os.path.join(checkout, 'requirements.txt')))


def test_a_python_without_the_packages_names_the_one_of_the_scripts(tmp_path):
    checkout = copy_checkout(str(tmp_path / 'code'))
    made = os.path.join(checkout, '.venv', 'bin', 'python')
    os.makedirs(os.path.dirname(made))
    open(made, 'w').close()
    program = os.path.join(checkout, 'run_predict.py')
    done = run(sys.executable, '-S', program, '--resume', 'a b.pth', cwd=str(tmp_path))
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and 'torch' in line and 'pip' not in line
    assert line.endswith("use it: %s %s --resume 'a b.pth'" % (made, program))


def test_a_package_that_is_missing_alone(tmp_path):
    """The Python has the other packages; the checkout has a space in its path."""
    checkout = copy_checkout(str(tmp_path / 'my code'))
    (tmp_path / 'sitecustomize.py').write_text(
        'import importlib.util\nfind = importlib.util.find_spec\n'
        'importlib.util.find_spec = lambda name, *rest: None if name == "timm" else find(name, *rest)\n')
    done = run(sys.executable, os.path.join(checkout, 'run_predict.py'), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert ' has no timm; run: ' in done.stderr
    assert "-r '%s'" % os.path.join(checkout, 'requirements.txt') in done.stderr


# ---- file descriptors

def test_too_few_file_descriptors_are_an_immediate_error(data, tmp_path):
    done = run(sys.executable, 'run_class_finetuning.py', '--data_path=' + data, *NANO[:-2], '--device=cpu',
               '--num_workers=2', limit=(32, 32), timeout=60)
    assert (done.returncode, done.stdout) == (2, '')
    assert re.match(r'run_class_finetuning\.py: error: a process may open only 32 files here, and a run needs \d+; '
                    r'raise the limit with ulimit -n \d+', done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_a_limit_that_may_be_raised_is_raised(data, tmp_path):
    """As on most systems: a soft limit of 256 or 1,024 and a high hard limit."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    output = str(tmp_path / 'output')
    done = run(sys.executable, 'run_class_finetuning.py', '--data_path=' + data, *NANO[:-2], '--device=cpu',
               '--num_workers=2', '--epochs=1', '--warmup_epochs=0', '--batch_size=4', '--output_dir=' + output,
               limit=(32, most))
    assert done.returncode == 0, done.stderr
    assert len(lines_of(output)) == 1


def test_the_fewest_files_that_are_allowed_are_enough(data, tmp_path):
    for flags in (['--num_workers=2'], ['--num_workers=10']):
        output = str(tmp_path / 'output')
        done = run(sys.executable, 'run_class_finetuning.py', '--data_path=' + data, *NANO[:-2], '--device=cpu', *flags,
                   '--epochs=1', '--warmup_epochs=0', '--batch_size=4', '--output_dir=' + output, limit=(256, 256))
        assert done.returncode == 0, done.stderr


# ---- shared memory

@pytest.fixture
def small_shm():
    """small_shm(kilobytes): a command prefix that gives the command a /dev/shm of that size."""
    def prefix(kilobytes):
        mount = 'mount -t tmpfs -o size=%dk none /dev/shm && exec "$@"' % kilobytes
        words = ['unshare', '-m', 'sh', '-c', mount, 'sh']
        if not os.path.isdir('/dev/shm') or run(*words, 'true').returncode:
            cannot_run('tmpfs', 'no right to mount a small /dev/shm here')
        return words
    return prefix


@pytest.mark.parametrize('processes', (1, 2))
@pytest.mark.parametrize('kilobytes, workers', [(2048, 1), (16, 0)])
def test_fewer_loader_processes_where_shared_memory_is_small(data, tmp_path, small_shm, kilobytes, workers, processes):
    """Docker's 64 MB are too small for ten loader processes with the default batch, which die with a bus error."""
    output = str(tmp_path / 'output')
    launcher = ['-m', 'beit.distributed.launcher', '--nproc_per_node=2'] if processes == 2 else []
    done = run(*small_shm(kilobytes * processes), sys.executable, *launcher, 'run_class_finetuning.py', *NANO,
               '--data_path=' + data, '--output_dir=' + output, '--num_workers=10', '--epochs=2', '--warmup_epochs=0',
               '--batch_size=4', '--input_size=128')
    assert done.returncode == 0, done.stderr
    assert len(lines_of(output)) == 2
    line, = [line for line in done.stdout.splitlines() if '/dev/shm' in line]
    assert ' %d loader processes, not of 10' % workers in line


def test_enough_shared_memory_changes_nothing(monkeypatch, capsys):
    from beit.data import shared_memory
    if not os.path.isdir('/dev/shm'):
        cannot_run('linux', 'no /dev/shm')
    assert shared_memory.workers_that_fit(4, 1000) == 4
    monkeypatch.setattr(shared_memory, 'FOLDER', '/nowhere')
    assert shared_memory.workers_that_fit(4, 2 ** 60) == 4
    assert capsys.readouterr().out == ''


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    output = str(tmp_path_factory.mktemp('trained') / 'out')
    assert run_class_finetuning.run(TINY + ['--data_path=' + data, '--output_dir=' + output]) == 0
    return output


@pytest.mark.parametrize('kilobytes', (256, 300, 400))
def test_a_prediction_fits_into_a_tiny_shared_memory(data, trained, tmp_path, small_shm, kilobytes):
    """Batches so small that their other tensors, a page each, need as much as the images."""
    done = run(*small_shm(kilobytes), sys.executable, 'run_predict.py', '--resume', trained, *[data] * 20,
               '--num_workers=4', '--batch_size=4', '--output', str(tmp_path / 'out.csv'), '--device=cpu')
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr and 'UserWarning' not in done.stderr
    assert re.search(r'^/dev/shm has room for the batches of \d loader processes, not of 4', done.stderr, re.M)
    assert len((tmp_path / 'out.csv').read_text().splitlines()) == 1 + 20 * 54


NO_ESTIMATE = 'import sys, datasets, run_predict, run_class_finetuning as train\n' \
    'datasets.workers_that_fit = run_predict.workers_that_fit = lambda wanted, *sizes: wanted\n' \
    'sys.exit((train if "--data_path" in sys.argv else run_predict).run(sys.argv[1:]))'


@pytest.mark.parametrize('size, kilobytes', [(32, 150), (128, 1000)])
@pytest.mark.parametrize('program', ['predict', 'train'])
def test_workers_without_room_end_the_program_with_one_line(data, trained, small_shm, program, size, kilobytes):
    """Where the estimate is too low: a batch that cannot be sent was lost, and the main process waited forever."""
    flags = ['--resume', trained, *[data] * 20, '--input_size=%d' % size] if program == 'predict' else [
        *NANO[:2], '--input_size=%d' % size, '--data_path', data, '--epochs=3', '--warmup_epochs=0']
    done = run(*small_shm(kilobytes), sys.executable, '-c', NO_ESTIMATE, *flags, '--num_workers=4', '--batch_size=8',
               '--device=cpu', timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'Traceback' not in done.stdout + done.stderr
    line = done.stderr.splitlines()[-1]
    assert 'error: /dev/shm has no room' in line and '--num_workers' in line


@pytest.mark.parametrize('program', ['predict', 'train'])
def test_more_workers_than_the_open_files_allow(data, trained, program):
    flags = ['run_predict.py', '--resume', trained, *[data] * 20] if program == 'predict' else [
        'run_class_finetuning.py', *NANO[:-2], '--data_path', data, '--epochs=1', '--warmup_epochs=0']
    done = run(sys.executable, *flags, '--num_workers=40', '--batch_size=4', '--device=cpu', limit=(256, 256))
    assert done.returncode == 0, done.stderr
    assert re.search(r'^--num_workers 40: a process may open only 256 files here, .* \d+ loader processes',
                     done.stdout + done.stderr, re.M)
    done = run(sys.executable, '-c', NO_ESTIMATE, *flags[1:], '--num_workers=90', '--batch_size=4', '--device=cpu',
               limit=(256, 256))
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert 'error: ' in line and '--num_workers' in line and 'ulimit -n' in line


# ---- a read-only checkout

def test_a_read_only_checkout(tmp_path):
    """Mounted read-only, as from a snapshot or an image: digits, logs and results go to the user's cache folder."""
    checkout, cache = copy_checkout(str(tmp_path / 'my code')), tmp_path / 'cache'
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    prefix = ['unshare', '-m', 'sh', '-c', mount, checkout]
    if run(*prefix, 'true').returncode:
        cannot_run('tmpfs', 'no right to mount a folder read-only here')
    done = run(*prefix, 'bash', os.path.join(checkout, 'test', 'train_full_1p.sh'), '--data_path=demo', '--epochs=1',
               '--maxstep=2', '--device=cpu', '--no_curves', cwd=str(tmp_path), XDG_CACHE_HOME=str(cache),
               PYTHON=sys.executable, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    own = str(cache / 'beit')
    lines = done.stdout.splitlines()
    assert lines[0] == '%s is read-only; logs and results go to %s' % (checkout, own)
    assert 'Wrote the UCI handwritten digits, 1,797 scans in 10 classes, to %s/data/digits' % own in lines
    assert os.path.isfile(os.path.join(own, 'test', 'output', '0', 'train_0.log'))
    assert len(lines_of(os.path.join(own, 'train_result'))) == 1
    assert sorted(os.listdir(os.path.join(own, 'data', 'digits'))) == ['train', 'val']
    assert not {'data', 'train_result'} & set(os.listdir(checkout))
    # The README's next command names a folder that is not in the checkout.
    done = run(*prefix, 'bash', 'test/train_eval_1p.sh', '--data_path=demo', '--resume=./train_result', '--device=cpu',
               cwd=checkout, XDG_CACHE_HOME=str(cache), PYTHON=sys.executable)
    assert done.returncode == 0 and 'Final Train Accuracy' in done.stdout, done.stdout + done.stderr
    # No cache folder can be made in /proc.
    done = run(*prefix, 'bash', 'test/train_full_1p.sh', '--data_path=demo', cwd=checkout, XDG_CACHE_HOME='',
               HOME='/proc')
    assert (done.returncode, done.stdout) == (2, '')
    line, = done.stderr.splitlines()
    assert '/proc/.cache/beit cannot be written to' in line and 'XDG_CACHE_HOME' in line


def in_common(checkout, commands, *words):
    """Start bash with commands that use the functions of test/common.sh."""
    return subprocess.Popen(['bash', '-c', 'source test/common.sh; ' + commands, 'script.sh', *words], cwd=checkout,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                            env={name: value for name, value in os.environ.items() if name != 'HOME'})


def test_without_the_variable_home_the_scripts_use_the_users_folder():
    out, err = in_common(ROOT, 'echo "$HOME"').communicate()
    assert (out.strip(), err) == (pwd.getpwuid(os.getuid()).pw_dir, '')


def test_two_scripts_install_packages_one_after_the_other(tmp_path):
    """The second once removed the half-made environment of the first."""
    commands = 'VENV=$1; make_venv() { echo made; sleep 2; mkdir -p "$VENV/bin"; ln -s "$1" "$VENV/bin/python"; ' \
        'cp "$REQUIREMENTS" "$(stamp "$REQUIREMENTS")"; }; need_venv "$2"'
    both = [in_common(ROOT, commands, str(tmp_path / 'venv'), sys.executable) for _ in range(2)]
    printed = sorted(process.communicate(timeout=60) for process in both)
    waiting = 'Waiting for another script, which installs packages into %s\n' % (tmp_path / 'venv')
    assert printed == [(waiting, ''), ('made\n', '')]


def test_a_virtual_environment_that_cannot_be_executed(tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').write_text('')
    process = in_common(ROOT, 'VENV=$1; need_venv "$2"', str(tmp_path), sys.executable)
    line, = process.communicate()[1].splitlines()
    assert process.returncode == 2 and '%s/bin/python cannot be executed; remove %s' % (tmp_path, tmp_path) in line


@pytest.mark.parametrize('flag, mode, says', [
    ('--epochs=2', 0o755, 'PYTHON={} lacks torch, torchvision, timm'),
    ('--epochs=2', 0o644, 'PYTHON={}: it cannot be executed'),
    ('--epoks=2', 0o755, '--epoks: unknown flag; did you mean --epochs?')])  # before packages are looked for
def test_an_unsuitable_python(tmp_path, flag, mode, says):
    program = tmp_path / 'python'
    program.write_text('#!/bin/sh\nexec %s -S "$@"\n' % sys.executable)
    program.chmod(mode)
    done = run('bash', 'test/train_full_1p.sh', '--data_path=demo', flag, PYTHON=str(program))
    line, = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, '') and says.format(program) in line


@pytest.mark.parametrize('flag, program', [
    ('--results_file', 'run_class_finetuning.py'), ('--output', 'run_predict.py'),
    ('--output', 'average_checkpoints.py')])
def test_a_file_in_a_read_only_folder_is_refused_at_the_start(data, trained, tmp_path, flag, program):
    flags = {'run_class_finetuning.py': ['--eval', '--resume', trained, '--data_path', data],
             'run_predict.py': ['--resume', trained, data], 'average_checkpoints.py': ['--inputs', trained]}[program]
    file = 'r.csv' if flag == '--results_file' else 'p.csv'
    done = run(sys.executable, os.path.join(ROOT, program), *flags, flag, file, cwd='/proc')
    line, = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, '') and '%s %s: /proc cannot be written to' % (flag, file) in line


# ---- --help and wrong flags take no time

@pytest.mark.parametrize('program', PROGRAMS + ('benchmarks/benchmark.py', 'benchmarks/check_device.py'))
@pytest.mark.parametrize('flags, status', [(['--help'], 0), (['--no_such_flag=1'], 2)])
def test_help_and_wrong_flags_come_before_the_slow_imports(program, flags, status, tmp_path):
    done = run(sys.executable, '-X', 'importtime', os.path.join(ROOT, program), *flags, cwd=str(tmp_path))
    imported = set(re.findall(r'^import time:.*\| +(\w+)', done.stderr, re.M))
    assert done.returncode == status and 'argparse' in imported
    assert not imported & {'torch', 'numpy', 'PIL', 'torchvision', 'timm', 'yaml'}
    if status == 0:
        assert re.search('--(resume|inputs|all|sections)', done.stdout)
    else:
        line = done.stderr.splitlines()[-1]
        assert line.startswith('%s: error: --no_such_flag' % os.path.basename(program))


EARLY = {
    'run_class_finetuning.py': (
        ['--config', '{epochs}', '--epoks=2'], ['--config', '{epoks}'], ['--config', '/nosuch'], [],
        ['--data_path=/nosuch'], ['--data_path={empty}'], ['--data_path=demo', '--data_set=nosuch'],
        ['--data_path=demo', '--epochs=2', '--warmup_epochs=5'], ['--model=nosuch'],
        ['--data_path=demo', '--finetune=nosuch'], ['--data_path=demo', '--resume=nosuch'], ['--eval'],
        ['--eval', '--resume={empty}'], ['--data_path=demo', '--report'], ['--data_path=demo', '--output_dir=/proc/x'],
        ['--data_path={empty}', '--train_csv=nosuch.csv'], ['--recipe=nosuch'],
        ['--data_path=demo', '--mixup_off_epoch=3'], ['--data_path=demo', '--model_ema_warmup'],
        ['--data_path=demo', '--compile_backend=eager'], ['--data_path=demo', '--opt_betas', '0.9'],
        ['--data_path=demo', '--device=tpu'], ['--data_path=demo', '--device=auto:1'],
        ['--data_path=demo', '--finetune=x.pt2'], ['--data_path=demo', '--finetune={empty}'],
        ['--data_path=demo', '--resume=x.onnx'], ['--data_path=demo', '--input_size=33'],
        ['--data_path=demo', '--class_weights=nosuch'], ['--data_path=demo', '--class_weights={epochs}'],
        ['--data_path=demo', '--unfreeze_epoch=3'], ['--data_path=demo', '--lr=1', '--blr=1'],
        ['--data_path=demo', '--freeze_backbone', '--unfreeze_epoch=30'], ['--data_path=demo', '--in_chans=4'],
        ['--data_path=demo', '--data_backend=fast', '--train_interpolation=lanczos'],
        ['--eval', '--resume={epochs}', '--data_path=nosuch'], ['--eval', '--resume={epochs}', '--val_csv=nosuch'],
        ['--eval', '--resume={epochs}', '--finetune={epochs}'], ['--eval', '--finetune=x.onnx', '--compile'],
        ['--eval', '--resume={epochs}', '--class_names=nosuch'], ['--eval', '--resume={epochs}', '--class_names={two}'],
        ['--eval', '--resume={epochs}', '--eval_data_path', '{empty}', 'nosuch'],
        ['--eval', '--resume={epochs}', '--image_folder_class_index_file=nosuch']),
    'run_predict.py': (
        ['--resume=nosuch', '{empty}'], ['--resume={empty}', 'nosuch.png'], ['--resume=x', '--model=no'], [],
        ['{empty}'], ['--resume={epochs}'], *(['--resume={epochs}', '{empty}', *each] for each in (
            ['--output=x.foo'], ['--output=x.png', '--format=csv'], ['--output=/proc/x.csv'], ['--layer=3'],
            ['--layer=0', '--features=x.npz'], ['--features=x.txt'], ['--features=/proc/x.npz'], ['--attention_heads'],
            ['--attention', '--attention_dir={empty}'], ['--attention_block=0', '--attention'],
            ['--attention', '--attention_dir=/proc/x'], ['--class_names=nosuch'])),
        ['--resume=x.onnx', '{empty}', '--features=x.npz']),
    'run_export.py': (
        ['--resume=nosuch', '--format=onnx'], ['--resume={empty}', '--format=onx'], [], ['--resume={epochs}'],
        ['--format=onnx'], ['--resume=x.onnx', '--format=onnx'], *(['--resume={epochs}', *each] for each in (
            ['--format=safetensors', '--opset=17'], ['--format=om'], ['--format=onnx', '--output={empty}'],
            ['--format=om', '--soc_version=Ascend910B4', '--output=x.onnx'], ['--format=onnx', '--output={epochs}'],
            ['--format=onnx', '--output=/proc/x'], ['--format=huggingface', '--output={epochs}'],
            ['--format=huggingface', '--output={parent}'],
            ['--format=safetensors', '--output=x.onnx'], ['--format=onnx', '--class_names=nosuch']))),
    'average_checkpoints.py': (
        ['--inputs=nosuch', '--output=x'], [], ['--output=x'], ['--inputs={empty}', '--output=x'],
        *(['--inputs={epochs}', *each] for each in ([], ['{epochs}', '--output=x'], ['--output={epochs}'],
                                                    ['--output={empty}'], ['--output=/proc/x'], ['--output=x.pt2']))),
    'run_linear_eval.py': (
        ['--data_path=demo'], ['--data_path=demo', '--finetune={epochs}'], ['--data_path=demo', '--output_dir=x'],
        ['--data_path=demo', '--finetune=nosuch', '--output_dir=x']),
    'benchmarks/benchmark.py': (
        ['foo'], ['--all', 'step'], ['step', '--foo'], *(['step', each] for each in (
            '--batch_size=0', '--model=nosuch', '--device=tpu', '--json={empty}', '--json=/proc/x', '--input_size=33')),
        ['step', '--', '--batch_sise=3'], ['data', '--data_path=nosuch']),
    'benchmarks/check_device.py': (['--device=tpu'], ['--sections=foo'], ['--output_dir=/proc/x'])}


@pytest.mark.parametrize('program, flags', [(program, each) for program, flags in EARLY.items() for each in flags])
def test_wrong_names_and_files_come_before_the_import_of_pytorch(program, flags, tmp_path):
    """One line from the first of the processes of a machine, none from the others until the launcher ends them."""
    for name, text in (('epochs', 'epochs: 2'), ('epoks', 'epoks: 2'), ('two', 'cat\ncat\n')):
        (tmp_path / name).write_text(text)
    (tmp_path / 'empty').mkdir()
    names = {name: str(tmp_path / name) for name in ('epochs', 'epoks', 'two', 'empty')}
    flags = [flag.format(parent=tmp_path, **names) for flag in flags]
    done = run(sys.executable, '-X', 'importtime', os.path.join(ROOT, program), *flags, cwd=str(tmp_path),
               RANK='0', WORLD_SIZE='2', LOCAL_RANK='0')
    lines = [line for line in done.stderr.splitlines() if not line.startswith('import time:')]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(
        os.path.basename(program) + ': error: ')
    assert not set(re.findall(r'^import time:.*\| +(\w+)', done.stderr, re.M)) & {'torch', 'torchvision', 'timm'}


def test_one_process_prints_the_help(tmp_path):
    for rank in '01':
        done = run(sys.executable, os.path.join(ROOT, 'run_class_finetuning.py'), '--help', RANK=rank, WORLD_SIZE='2',
                   LOCAL_RANK=rank)
        assert (done.returncode, bool(done.stdout), done.stderr) == (0, rank == '0', '')


def test_the_tables_that_flags_reads_are_those_of_the_modules():
    import flags
    import modeling_finetune
    import optim_factory
    from beit.outputs import export_formats, prediction_writers

    assert tuple(modeling_finetune.MODELS) == flags.MODELS and tuple(optim_factory.OPTIMIZERS) == flags.OPTIMIZERS
    formats = {name: {field: getattr(each, field) for field in ('takes', 'files') if getattr(each, field)}
               for name, each in export_formats.FORMATS.items()}
    assert formats == flags.EXPORT_FORMATS
    assert export_formats.OPSETS[0] == flags.NEWEST_OPSET
    assert tuple(sorted(prediction_writers.FORMATS)) == flags.PREDICTION_FORMATS
