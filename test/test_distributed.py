"""Several processes on this machine over gloo: each image counted once, and errors that end all of them in one line."""

import os
import re
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from test_training import RUN, lines_of


def launch(processes, *flags, timeout=240):
    """test/launch.py with so many processes: (exit status, standard output, standard error)."""
    result = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'test', 'launch.py'), '--nproc_per_node=%d' % processes, '--']
        + RUN + list(flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout,
        env=dict(os.environ, OMP_NUM_THREADS='1'))
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def trained(image_folder, tmp_path):
    """(data folder with 26 validation images, folder of a checkpoint)."""
    import run_class_finetuning
    data, output = image_folder(val=13), str(tmp_path / 'out')
    assert run_class_finetuning.run(RUN + ['--data_path=' + data, '--epochs=1', '--output_dir=' + output]) == 0
    return data, output


def figures(out):
    """(images, accuracy line, loss) that an evaluation printed."""
    assert out.count('* Acc@1') == 1, out  # by one process only
    return (re.search(r'on the (\d+) test images', out).group(1), re.search(r'\* Acc@1.* Acc@5 [\d.]+', out).group(),
            float(re.search(r'Result: .* loss ([\d.]+)', out).group(1)))


def test_every_image_is_counted_exactly_once(trained):
    data, output = trained
    results = {}
    for processes in (1, 2, 3):  # 26 images: 13 and 13; 9, 9 and 8
        status, out, err = launch(processes, '--data_path=' + data, '--eval', '--dist_eval', '--resume=' + output)
        assert status == 0, err
        results[processes] = figures(out)
    assert results[1][0] == '26'
    for processes in (2, 3):
        assert results[processes][:2] == results[1][:2]
        assert results[processes][2] == pytest.approx(results[1][2], abs=1e-4)


def test_more_processes_than_images(trained, image_folder):
    _, output = trained
    data = image_folder(val=1, name='two images')
    status, out, err = launch(3, '--data_path=' + data, '--eval', '--dist_eval', '--resume=' + output)
    assert status == 0, err
    assert figures(out)[0] == '2'


def test_one_process_has_a_batch_more_than_the_other(image_folder, tmp_path):
    output = str(tmp_path / 'out')
    status, out, err = launch(2, '--data_path=' + image_folder(val=3, classes=('a', 'b', 'c')), '--epochs=1',
                              '--batch_size=1', '--maxstep=2', '--dist_eval', '--output_dir=' + output, '--model_ema')
    assert status == 0, err
    assert 'Accuracy of the network on the 9 test images' in out  # 5 batches of one image and 4
    assert 'Accuracy of the averaged network (EMA) on the 9 test images' in out


def test_one_process_evaluates_all_without_dist_eval(trained):
    data, output = trained
    status, out, _ = launch(2, '--data_path=' + data, '--eval', '--resume=' + output)
    assert status == 0
    assert figures(out)[0] == '26'


def test_only_the_first_process_speaks_and_writes(image_folder, tmp_path):
    output = str(tmp_path / 'out')
    status, out, err = launch(2, '--data_path=' + image_folder(), '--epochs=2', '--output_dir=' + output,
                              '--model_ema', '--clip_grad=1', '--update_freq=2', '--log_dir=' + str(tmp_path / 'tb'))
    assert status == 0, err
    assert out.count('Epoch: [1]  [0/2]') == 1
    assert [line['epoch'] for line in lines_of(output)] == [0, 1]
    assert len(os.listdir(str(tmp_path / 'tb'))) == 1


def test_a_loss_that_is_not_finite_ends_every_process(image_folder):
    started = time.time()
    status, _, err = launch(2, '--data_path=' + image_folder(), '--epochs=3', '--lr=1e30', '--min_lr=1e30')
    assert status == 2
    assert len(re.findall(r'run_class_finetuning.py: error: process \d: the loss is', err)) == 1
    assert 'Traceback' not in err
    assert time.time() - started < 120


def test_resuming_on_another_number_of_processes(image_folder, tmp_path):
    data, output = image_folder(), str(tmp_path / 'out')
    base = ['--data_path=' + data, '--output_dir=' + output, '--epochs=2', '--save_ckpt_freq=1', '--auto_resume']
    assert launch(2, *base + ['--batch_size=4', '--maxstep=4'])[0] == 0
    status, out, err = launch(1, *base + ['--batch_size=8'])
    assert status == 0, err
    assert 'epoch 0 is done' in out
    assert [line['epoch'] for line in lines_of(output)] == [0, 1]
