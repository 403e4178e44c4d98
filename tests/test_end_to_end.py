"""Whole runs: the digits from a fresh checkout to an accuracy, BEiT base on photographs, two processes against one."""

import os
import re
import shutil

import pytest
import torch

from beit.files import weights_file
from helpers import NANO, check_summary, copy_checkout, lines_of, photo, result, run_script

PHOTO_SIZES = ((500, 375), (375, 500), (400, 400), (1600, 1200))  # ImageNet's usual ones, and a large one


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


# ---- two processes and one

def test_two_processes_train_as_one_of_twice_the_batch(tmp_path, image_folder):
    """Same losses and weights, without augmentation: the processes share the data in the order that one reads it."""
    checkout = copy_checkout(str(tmp_path / 'my code' / 'beit'))
    flags = NANO + ['--data_path=' + image_folder(train=24), '--finetune=', '--epochs=2', '--warmup_epochs=1',
                    '--lr=1e-3', '--init_scale=1', '--aa=none', '--reprob=0', '--color_jitter=0', '--drop_path=0',
                    '--hflip=0']
    one = run_script(checkout, 'train_full_1p', *flags, '--batch_size=8', '--output_dir=one')
    two = run_script(checkout, 'train_full_8p', *flags, '--batch_size=4', '--output_dir=two', '--nproc_per_node=2')
    assert result(one)['accuracy'] == result(two)['accuracy']

    logs, weights = [], []
    for name in ('one', 'two'):
        logs.append(lines_of(os.path.join(checkout, name)))
        weights.append(weights_file.load_weights_file(os.path.join(checkout, name, 'checkpoint-1.pth'))['model'])
    assert [line['epoch'] for line in logs[0]] == [line['epoch'] for line in logs[1]] == [0, 1]
    for first, second in zip(*logs):
        assert first['train_loss'] == pytest.approx(second['train_loss'], abs=1e-5)
        assert first['test_loss'] == pytest.approx(second['test_loss'], abs=1e-5)
    assert logs[0][0]['train_loss'] != pytest.approx(logs[0][1]['train_loss'], abs=1e-3)  # something was learnt
    for name, value in weights[0].items():
        assert torch.allclose(value.double(), weights[1][name].double(), rtol=0, atol=2e-5), name
