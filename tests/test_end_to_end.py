"""Whole runs: the digits from a fresh checkout to an accuracy, BEiT base on photographs."""

import glob
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from docs_commands import RUN_IN_ORDER, blocks
from helpers import check_summary, copy_checkout, lines_of, needs_extra, photo, result, run_script

PHOTO_SIZES = ((500, 375), (375, 500), (400, 400), (1600, 1200))  # ImageNet's usual ones, and a large one
NUMBER = r'\d+(?:\.\d+)?(?:e[-+]\d+)?'


# ---- the digits, by the README's two commands

@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """(checkout, run) of the main job. It takes a minute and more, so it's run once."""
    folder = copy_checkout(str(tmp_path_factory.mktemp('digits') / 'my code' / 'beit'))
    return folder, run_script(folder, 'train_full_1p', '--data_path=demo', timeout=900)


def test_the_digits_reach_97_percent(digits_run):
    checkout, run = digits_run
    figures = check_summary(checkout, 'train_full_1p', run, batch_size=64, devices=1)
    assert float(figures['TrainAccuracy']) >= 97.
    assert 'Data: 1437 training and 360 validation images' in run.out
    assert re.search('Flags: .*--hflip=0', run.out)  # the preset is shown in the log


def test_the_evaluation_script_prints_the_same_accuracy(digits_run):
    checkout, run = digits_run
    evaluation = run_script(checkout, 'train_eval_1p', '--data_path=demo', '--resume=./train_result')
    check_summary(checkout, 'train_eval_1p', evaluation, batch_size=64, devices=1)
    assert result(evaluation)['accuracy'] == result(run)['accuracy']
    assert 'on the 360 test images' in evaluation.out


@pytest.fixture(scope='module')
def scripts_venv(digits_run):
    """The checkout with the .venv that the scripts make on a fresh machine; it sees this Python's packages."""
    checkout, _ = digits_run
    venv_dir = os.path.join(checkout, '.venv')
    subprocess.run([sys.executable, '-m', 'venv', venv_dir], check=True)
    packages = glob.glob(os.path.join(venv_dir, 'lib', '*', 'site-packages'))[0]
    with open(os.path.join(packages, 'tests.pth'), 'w', encoding='utf-8') as file:
        file.write(os.path.dirname(os.path.dirname(torch.__file__)))
    shutil.copy(os.path.join(checkout, 'requirements.txt'), os.path.join(venv_dir, 'installed.txt'))
    return checkout


@pytest.mark.current_only
@needs_extra('matplotlib', 'onnx', 'onnxscript', 'onnxruntime')
@pytest.mark.parametrize('page', RUN_IN_ORDER)
def test_the_commands_of_a_page_work_as_printed(scripts_venv, page):
    """In a shell without this Python on its PATH, and with the results of README's first command."""
    first, *others = blocks(page)
    assert page != 'README.md' or first[1] == 'bash test/train_full_1p.sh --data_path=demo\n'  # digits_run ran it
    lines, expected = ['set -e', 'source .venv/bin/activate' if page != 'README.md' else ''], []
    for language, block in others if page == 'README.md' else [first] + others:
        if language == 'bash':
            lines.append(block)
        elif language == 'python':
            lines.append("python - <<'END'\n%sEND" % block)
        elif language == 'text' and len(lines) > 2:
            expected += block.splitlines()
    env = {name: value for name, value in os.environ.items() if name not in ('PYTHON', 'VIRTUAL_ENV', 'PYTHONPATH')}
    env['PATH'] = '/usr/local/bin:/usr/bin:/bin'
    done = subprocess.run(['bash', '-c', '\n'.join(lines)], cwd=scripts_venv, env=env, timeout=900, check=False,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout
    for line in expected:  # the figures vary
        pattern = NUMBER.join(map(re.escape, re.split(NUMBER, line)))
        assert re.search('(?m)^%s$' % pattern, done.stdout), (line, done.stdout)


# ---- BEiT base on photographs

@pytest.fixture
def photographs(tmp_path):
    """Two classes of JPEG files: 12 to train on, three batches of 4, and 4 to evaluate."""
    root = tmp_path / 'my photographs'
    for label, name in enumerate(('n01440764', 'n01443537')):
        for split, count in (('train', 6), ('val', 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = PHOTO_SIZES[(index + label + (split == 'val')) % len(PHOTO_SIZES)]
                photo(10 * label + index + 100 * (split == 'val'), *size).save(str(folder / ('%d.JPEG' % index)))
    return str(root)


@pytest.fixture
def roomy_checkout(tmp_path):
    """A checkout whose results, a gigabyte a checkpoint, are removed after the test."""
    folder = copy_checkout(str(tmp_path / 'my code' / 'beit'))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.current_only
def test_beit_base_on_photographs(roomy_checkout, photographs):
    """Three steps with every default augmentation, an evaluation that agrees, and a resume for one more step."""
    flags = ['--data_path=' + photographs, '--batch_size=4', '--device=cpu', '--num_workers=2']
    training = flags + ['--finetune=', '--epochs=2', '--warmup_epochs=1']
    run = run_script(roomy_checkout, 'train_full_1p', *training, '--maxstep=3')
    check_summary(roomy_checkout, 'train_full_1p', run, batch_size=4, devices=1, model='beit_base_patch16_224')
    assert '--aa=rand-m9-mstd0.5-inc1 ' in run.out and '--reprob=0.25 ' in run.out and '--hflip=0.5 ' in run.out
    assert 'Model: beit_base_patch16_224, 85.76 M parameters, 2 classes, input 224x224' in run.out
    assert 'Epoch: [0]  [2/3]' in run.out and 'on the 4 test images' in run.out

    evaluation = run_script(roomy_checkout, 'train_eval_1p', *flags, '--resume=train_result')
    assert result(evaluation)['accuracy'] == result(run)['accuracy']

    resumed = run_script(roomy_checkout, 'train_full_1p', *training, '--maxstep=4', '--resume=train_result',
                         '--no_save_ckpt')
    result(resumed)
    assert 'epoch 1 is done' in resumed.out
    assert 'Epoch: [1]  [0/1]' in resumed.out and 'Epoch: [0]' not in resumed.out
    lines = lines_of(os.path.join(roomy_checkout, 'train_result'))
    assert [line['epoch'] for line in lines] == [0, 1]
    assert 0.5 < lines[1]['train_loss'] < 1.  # two classes, hardly trained: about log 2
