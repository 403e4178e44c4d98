"""On an unsuitable machine the programs print one line, and none hangs."""

import os
import re
import resource
import subprocess
import sys

import pytest

from helpers import NANO, ROOT, cannot_run, copy_checkout, environment, lines_of

pytestmark = pytest.mark.current_only
PROGRAMS = ('run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py')


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


# ---- --help and wrong flags take no time

@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize('flags, status', [(['--help'], 0), (['--no_such_flag=1'], 2)])
def test_help_and_wrong_flags_come_before_the_slow_imports(program, flags, status, tmp_path):
    done = run(sys.executable, '-X', 'importtime', os.path.join(ROOT, program), *flags, cwd=str(tmp_path))
    imported = set(re.findall(r'^import time:.*\| +(\w+)', done.stderr, re.M))
    assert done.returncode == status and 'flags' in imported
    assert not imported & {'torch', 'numpy', 'PIL', 'torchvision', 'timm', 'yaml'}
    if status == 0:
        assert '--resume' in done.stdout or '--inputs' in done.stdout
    else:
        line = done.stderr.splitlines()[-1]
        assert line.startswith('%s: error: --no_such_flag: unknown flag' % program)


def test_the_tables_that_flags_reads_are_those_of_the_modules():
    import flags
    import modeling_finetune
    import optim_factory
    from beit.outputs import export_formats, prediction_writers

    assert tuple(modeling_finetune.MODELS) == flags.MODELS and tuple(optim_factory.OPTIMIZERS) == flags.OPTIMIZERS
    assert tuple(export_formats.FORMATS) == flags.EXPORT_FORMATS and export_formats.OPSETS[0] == flags.NEWEST_OPSET
    assert tuple(sorted(prediction_writers.FORMATS)) == flags.PREDICTION_FORMATS
