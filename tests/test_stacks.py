"""PyTorch 1.5, 1.8 and the current one train alike, read each other's files, and refuse unsupported settings.

The test_across_… tests run only with the current PyTorch and start the Pythons of the other two: from run_tests.sh
--stack (.venv-1.5, .venv-1.8), or from STACKS=/path/to/python:/path/to/another. The other tests cover the PyTorch that
runs them.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from beit.files import weights_file
from helpers import ROOT, RUN, assert_one_line, cannot_run, launch, lines_of, write_images

pytestmark = pytest.mark.computes

OLD = ('1.5', '1.8')
# At 40 pixels timm crops, with equal random numbers everywhere; torchvision's crops at 32 pixels differ.
PLAIN = RUN + ['--input_size=40', '--reprob=0', '--color_jitter=0', '--drop_path=0', '--hflip=0', '--opt=adamw',
               '--lr=1e-3', '--seed=3', '--save_ckpt_freq=1']
EMA = ['--model_ema', '--model_ema_decay=0.9']

# Runs the program once for each argument, a JSON list of flags, in one process, because imports are slow. Two plain
# paths extract a checkpoint's weights with torch.save.
RUNS = """import json, sys
import run_class_finetuning, torch; from beit.files import weights_file
for flags in map(json.loads, sys.argv[1:]):
    print('==== next', flush=True)
    if len(flags) == 2:
        torch.save({'model': weights_file.load_weights_file(flags[0])['model']}, flags[1])
    elif run_class_finetuning.run(flags):
        sys.exit(1)
"""


def in_stack(python, *runs):
    """The output of each run (a list of flags) in one process of this Python."""
    done = subprocess.run([python, '-c', RUNS] + [json.dumps(flags) for flags in runs], cwd=ROOT, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split('==== next\n')[1:]


def stack_of(version):
    return '.'.join(version.split('.')[:2])


# ---- across the three stacks

@pytest.fixture(scope='module')
def pythons():
    """{'1.5': path, '1.8': path, 'current': path}"""
    if stack_of(torch.__version__) in OLD:
        cannot_run('stacks', 'the tests across the stacks are for the current PyTorch')
    places = os.environ['STACKS'].split(':') if os.environ.get('STACKS') \
        else [os.path.join(ROOT, '.venv-%s' % name, 'bin', 'python') for name in OLD]
    found = {'current': sys.executable}
    for place in places:
        if os.access(place, os.X_OK):
            version = subprocess.check_output([place, '-c', 'import torch; print(torch.__version__)'],
                                              universal_newlines=True)
            found[stack_of(version)] = place
    missing = [name for name in OLD if name not in found]
    if missing:
        cannot_run('stacks', 'there is no Python with PyTorch %s; test/run_tests.sh --stack=%s makes one'
                   % (' and '.join(missing), missing[0]))
    return found


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('stacks') / 'data', train=24, val=10)


@pytest.fixture(scope='module')
def first(pythons, data, tmp_path_factory):
    """{stack: folder} after the first of two epochs; weights.pth has the weights, saved by that stack's torch.save."""
    folders = {}
    for stack, python in pythons.items():
        folders[stack] = folder = str(tmp_path_factory.mktemp('first') / stack)
        in_stack(python, PLAIN + EMA + ['--data_path=' + data, '--epochs=2', '--maxstep=6', '--output_dir=' + folder],
                 [os.path.join(folder, 'checkpoint-0.pth'), os.path.join(folder, 'weights.pth')])
    return folders


@pytest.fixture(scope='module')
def second(pythons, first, data, tmp_path_factory):
    """{(written by, read by): (folder after the second epoch, text of an evaluation, folder of a fine-tuning)}"""
    found = {}
    for reader, python in pythons.items():
        runs, folders = [], {}
        for writer, source in first.items():
            folders[writer] = [str(tmp_path_factory.mktemp(name)) for name in ('resumed', 'tuned')]
            base = PLAIN + ['--data_path=' + data]
            runs += [base + EMA + ['--epochs=2', '--resume=' + source, '--output_dir=' + folders[writer][0]],
                     base + EMA + ['--eval', '--resume=' + source],
                     base + ['--epochs=1', '--finetune=' + os.path.join(source, 'weights.pth'),
                             '--output_dir=' + folders[writer][1]]]
        texts = in_stack(python, *runs)
        for number, writer in enumerate(first):
            assert 'epoch 1 is done' in texts[3 * number]
            found[writer, reader] = folders[writer][0], texts[3 * number + 1], folders[writer][1]
    return found


def assert_alike(line, other):
    """Two lines of log.txt: every figure within 1e-5 of its size, accuracies exact."""
    assert line.keys() == other.keys()
    for name in line:
        expected = other[name] if isinstance(other[name], str) else pytest.approx(other[name], rel=1e-5, abs=1e-7)
        assert line[name] == expected, name


def weights_of(folder, name='checkpoint-1.pth'):
    content = weights_file.load_weights_file(os.path.join(folder, name))
    return dict(content['model'], **{'average of ' + name: value for name, value in content['model_ema'].items()})


def assert_near(weights, other, tolerance):
    assert weights.keys() == other.keys()
    for name, value in weights.items():
        assert torch.allclose(value.double(), other[name].double(), rtol=0, atol=tolerance), name


@pytest.mark.parametrize('stack', OLD)
def test_across_stacks_an_epoch_is_the_same(first, stack):
    line, = lines_of(first[stack])
    assert_alike(line, lines_of(first['current'])[0])
    assert_near(*[weights_of(first[name], 'checkpoint-0.pth') for name in (stack, 'current')], tolerance=2e-5)


@pytest.mark.parametrize('writer', OLD + ('current',))
@pytest.mark.parametrize('reader', OLD + ('current',))
def test_across_stacks_a_checkpoint_resumes(second, first, reader, writer):
    """As in the stack that wrote it: optimizer, averages, order and random numbers are restored."""
    folder, own = second[writer, reader][0], second[writer, writer][0]
    line, = lines_of(folder)
    assert line['epoch'] == 1
    assert_alike(line, lines_of(own)[-1])
    assert_near(weights_of(folder), weights_of(own), tolerance=2e-5)
    moved = weights_of(own)['head.weight'] - weights_of(first[writer], 'checkpoint-0.pth')['head.weight']
    assert moved.abs().max() > 5e-4  # else the tolerance would prove nothing


@pytest.mark.parametrize('writer', OLD + ('current',))
def test_across_stacks_a_checkpoint_evaluates_the_same(second, first, writer):
    """Each stack evaluates it, and its average, as the stack that trained it."""
    trained, = lines_of(first[writer])
    for reader in OLD + ('current',):
        text = second[writer, reader][1]
        accuracy, loss = re.search(r'Result: .* accuracy ([\d.]+) loss ([\d.]+)', text).groups()
        assert float(accuracy) == pytest.approx(trained['test_acc1'], abs=1e-3)
        assert float(loss) == pytest.approx(trained['test_loss'], abs=1e-4)
        average = re.search(r'averaged network \(EMA\) on the 20 test images: ([\d.]+)%', text).group(1)
        assert float(average) == pytest.approx(trained['test_ema_acc1'], abs=1e-3)


@pytest.mark.parametrize('writer', OLD + ('current',))
def test_across_stacks_weights_are_fine_tuned_the_same(second, writer):
    lines = [lines_of(second[writer, reader][2])[0] for reader in OLD + ('current',)]
    for line in lines[:2]:
        assert_alike(line, lines[2])


# ---- limits of the PyTorch that runs this

# Measured: (autocast to bfloat16 on a CPU, training in bfloat16 on a CPU).
CAN = {'1.5': {'O1': False, 'O2': False}, '1.8': {'O1': False, 'O2': False}}
THIS = CAN.get(stack_of(torch.__version__), {'O1': True, 'O2': True})


@pytest.mark.parametrize('flags, level', [(['--amp'], 'O2'), (['--amp', '--opt-level=O1'], 'O1'),
                                          (['--amp', '--opt-level=O2', '--amp_dtype=bfloat16'], 'O2')], ids=str)
def test_half_precision_trains_or_is_refused(program, data, tmp_path, flags, level):
    """In an ordinary process. PyTorch 1.5 and 1.8 refuse before any file is written."""
    output = str(tmp_path / 'o')
    status, out, err = program(*RUN + flags + ['--data_path=' + data, '--epochs=1', '--maxstep=2',
                                               '--output_dir=' + output])
    if THIS[level]:
        assert status == 0, err
        assert 'bfloat16' in re.search('Precision: .*', out).group()
    else:
        assert_one_line(status, out, err, ['--opt-level ' + level, 'this PyTorch', 'bfloat16 on cpu', 'leave --amp out',
                                           'use a newer one'])
        assert not os.path.exists(output)


def test_half_precision_of_several_processes(data):
    """Every process finds that it is unsupported, and one reports it."""
    status, out, err = launch(2, '--data_path=' + data, '--epochs=1', '--maxstep=1', '--amp')
    if THIS['O2']:
        assert status == 0, err
    else:
        assert_one_line(status, out, err, ['--opt-level O2', 'leave --amp out'])
        assert out == ''


# ---- the lowest versions that requirements.txt allows

DIGITS = RUN + ['--data_path=demo', '--batch_size=16', '--lr=1e-3', '--layer_decay=1', '--drop_path=0', '--hflip=0',
                '--color_jitter=0', '--reprob=0']


@pytest.mark.soak
def test_the_lowest_versions_install_and_train(tmp_path):
    """PyTorch 2.1 in a new environment: the model's tests pass, and the digits are trained and evaluated."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('MUST_RUN', 'BEIT_SOAK', 'PYTHON') and not name.startswith('PYTEST_')}
    done = subprocess.run(['bash', os.path.join(ROOT, 'test', 'run_tests.sh'), '--stack=2.1', '-n', '0',
                           'tests/test_model.py', 'tests/test_numerics.py', 'tests/test_attention.py'],
                          timeout=3600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                          env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
    python, folder = os.path.join(ROOT, '.venv-2.1', 'bin', 'python'), str(tmp_path)
    assert subprocess.check_output([python, '-c', 'import torch; print(torch.__version__)']).startswith(b'2.1.')
    trained, evaluated = in_stack(python, DIGITS + ['--epochs=3', '--output_dir=' + folder],
                                  DIGITS + ['--eval', '--resume=' + folder])
    accuracy = [re.search(r'Result: .* accuracy ([\d.]+)', text).group(1) for text in (trained, evaluated)]
    assert accuracy[0] == accuracy[1] and float(accuracy[0]) > 20  # chance is 10
