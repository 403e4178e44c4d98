"""The shell scripts, run as a user runs them, in a copy of the repository whose path has a space."""

import collections
import glob
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from conftest import NANO, ROOT, photo

TRAINING = ('train_full_1p', 'train_full_8p', 'train_performance_1p', 'train_performance_8p')
SCRIPTS = TRAINING + ('train_eval_1p',)
SUFFIX = {'full': 'acc', 'performance': 'perf', 'eval': 'eval'}
LOG = {'full': 'train_0', 'performance': 'train_0_perf', 'eval': 'train_0_eval'}
TINY = NANO + ['--batch_size=4', '--epochs=1', '--warmup_epochs=0', '--finetune=', '--lr=1e-3']
BLOCK = re.compile(r'-{18} Final result -{18}\n'
                   r'Final Performance images/sec : (?P<fps>\d+\.\d\d)\n'
                   r'Final Train Accuracy : (?P<accuracy>\d+\.\d{3}|n/a)\n'
                   r'E2E Training Duration sec : (?P<seconds>\d+)\n\Z')
SUMMARY_NAMES = ['Network', 'RankSize', 'BatchSize', 'DeviceType', 'CaseName', 'ActualFPS', 'TrainingTime',
                 'TrainAccuracy', 'ActualLoss', 'E2ETrainingTime']
DATED = r'-\d{8}-\d{6}(-\d+)?'

Run = collections.namedtuple('Run', 'status out err')


# ---- a checkout to run in, data, a script

def copy_checkout(folder):
    """The repository's own files, tracked or new but not what an earlier run left, copied into `folder`."""
    try:
        names = subprocess.check_output(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                                        cwd=ROOT, stderr=subprocess.DEVNULL).decode().split('\0')
    except (OSError, subprocess.CalledProcessError):
        names = []  # an archive without its history, or a machine without git
    if not any(names):
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
            '.git', '.venv*', 'data', 'train_result*', 'output', 'prof', '__pycache__', '.*_cache', '*.pth'))
        return folder
    for name in names:
        source, target = os.path.join(ROOT, name), os.path.join(folder, name)
        if os.path.isfile(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy2(source, target)
    return folder


def environment(**changes):
    env = {name: value for name, value in os.environ.items()
           if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    return dict(env, PYTHON=sys.executable, **changes)


def start_script(checkout, script, *flags, where='', **env):
    """Start test/<script>.sh from the root, or with where='test' from there."""
    path = os.path.join('' if where else 'test', script + '.sh')
    return subprocess.Popen(['bash', path] + list(flags), cwd=os.path.join(checkout, where), env=environment(**env),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True)


def run_script(checkout, script, *flags, where='', timeout=300, **env):
    process = start_script(checkout, script, *flags, where=where, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Run(process.returncode, out, err)


def output(checkout, name=''):
    return os.path.join(checkout, 'test', 'output', '0', name)


def contents(folder):
    """{path in the folder: bytes} of all files."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, 'rb') as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def text(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def result(run):
    """The figures of the final block, which must be the last that a run prints."""
    assert run.status == 0, run.out + run.err
    found = BLOCK.search(run.out)
    assert found, run.out
    return found.groupdict()


def summary(checkout, case):
    """The summary file's figures, by name; exactly the ten lines, in their order."""
    lines = text(output(checkout, case + '.log')).splitlines()
    pairs = [line.split(' = ') for line in lines]
    assert [pair[0] for pair in pairs] == SUMMARY_NAMES
    figures = dict(pairs)
    assert figures['CaseName'] == case
    return figures


def check_summary(checkout, script, run, batch_size, devices, model='beit_nano_patch8_32'):
    """The file is where tools look for it, each figure is a bare number, and they agree with the block and each other."""
    kind = script.split('_')[1]
    figures = summary(checkout, '%s_bs%d_%dp_%s' % (model, batch_size, devices, SUFFIX[kind]))
    block = result(run)
    assert os.path.isfile(output(checkout, LOG[kind] + '.log'))
    assert (figures['Network'], figures['RankSize'], figures['BatchSize'], figures['DeviceType']) \
        == (model, str(devices), str(batch_size), platform.machine())
    assert (figures['ActualFPS'], figures['TrainAccuracy'], figures['E2ETrainingTime']) \
        == (block['fps'], block['accuracy'], block['seconds'])
    assert re.match(r'\d+\.\d\d$', figures['ActualFPS']) and float(figures['ActualFPS']) > 0
    assert re.match(r'\d+\.\d{3}$', figures['TrainingTime'])
    assert re.match(r'\d+\.\d{4}$', figures['ActualLoss'])
    assert re.match(r'\d+$', figures['E2ETrainingTime'])
    if kind == 'performance':
        assert figures['TrainAccuracy'] == 'n/a'  # nothing is evaluated
    else:
        assert 0 <= float(figures['TrainAccuracy']) <= 100
    if kind != 'eval':  # there the last batch is smaller
        expected = 1000. * batch_size * devices / float(figures['ActualFPS'])
        assert float(figures['TrainingTime']) == pytest.approx(expected, rel=1e-3)
    assert float(figures['TrainingTime']) < 1000 * (int(figures['E2ETrainingTime']) + 1)
    return figures


def fails(run, *expected):
    """A user's mistake: status 2, an error line with the expected words, no traceback, no result."""
    assert run.status == 2, run.out + run.err
    assert 'Final result' not in run.out
    assert 'Traceback' not in run.out + run.err
    errors = [line for line in (run.out + run.err).splitlines() if 'error: ' in line]
    assert len(errors) == 1, run.out + run.err
    for words in expected:
        assert words in errors[0]


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(str(tmp_path / 'my code' / 'beit'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two classes that a tiny model can half learn: 32 training and 22 validation images, of another tint each."""
    root = tmp_path_factory.mktemp('scripts') / 'my data'
    for split, count in (('train', 16), ('val', 11)):
        for label, (name, tint) in enumerate((('cat', (150, 90, 60)), ('dog', (90, 120, 150)))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture = photo(1000 * label + index + (500 if split == 'val' else 0), 32, 32)
                Image.blend(picture, Image.new('RGB', picture.size, tint), 0.3).save(str(folder / ('%03d.png' % index)))
    return str(root)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data):
    """(checkout, run) after one epoch of train_full_1p.sh from the root. Tests that change it take `after_training`."""
    folder = copy_checkout(str(tmp_path_factory.mktemp('trained') / 'my code' / 'beit'))
    return folder, run_script(folder, 'train_full_1p', '--data_path=' + data, *TINY)


@pytest.fixture
def after_training(trained, tmp_path):
    """A copy of its own of that checkout, with what the run left there."""
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


# ---- what a script hands to Python, read by a stand-in for it

STAND_IN = '''#!/usr/bin/env bash
if [ "$1" = -c ]; then echo cpu; exit; fi
printf '%s\\n' "$@" >"$RECORD"
echo "cann ${FAKE_CANN:-none}" >>"$RECORD.env"
echo "Result: images_per_second 1157.00 step_milliseconds 442.524 accuracy 85.238 loss 1.2345"
exit "${STATUS:-0}"
'''


@pytest.fixture
def stand_in(tmp_path, checkout):
    """stand_in('train_full_1p', …): (run, the arguments that Python would have got)."""
    program, record = tmp_path / 'stand in', str(tmp_path / 'record')
    program.write_text(STAND_IN)
    program.chmod(0o755)

    def run(script, *flags, where='', **env):
        done = run_script(checkout, script, *flags, where=where, **dict({'RECORD': record}, PYTHON_STAND_IN='1', **env))
        return done, text(record).splitlines() if os.path.exists(record) else None

    def environment_with_stand_in(real=environment):
        return lambda **changes: dict(real(**changes), PYTHON=str(program))
    run.record = record
    patch = pytest.MonkeyPatch() if hasattr(pytest, 'MonkeyPatch') else None
    patch.setitem(globals(), 'environment', environment_with_stand_in())
    yield run
    patch.undo()
