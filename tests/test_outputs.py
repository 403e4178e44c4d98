"""Readers of the outputs: a spreadsheet, a closed terminal, a full disk behind standard output."""

import csv
import io
import os
import re
import subprocess
import sys

import pytest

import run_class_finetuning
from beit.errors import guard_cell
from beit.outputs.prediction_writers import CsvWriter, Prediction
from beit.training import metrics
from helpers import COLD, PROGRAM, RUN, TINY, copy_checkout, environment, lines_of, text

pytestmark = pytest.mark.current_only


# ---- spreadsheets

@pytest.mark.parametrize('text', ['=1+1', '+1+1', '-1+1', '@SUM(A1)', '=cmd|\' /C calc\'!A0', '-', '-photo.jpg', '+.',
                                  '-0.5.jpg', '=', '-nan'])
def test_a_cell_that_a_spreadsheet_would_compute_is_text(text):
    assert guard_cell(text) == "'" + text


@pytest.mark.parametrize('value', ['-0.5', '+3', '-1e-5', '-.5', '-2.', '', 'a=b', 'a-b', ' =1', '0.250000', -0.5,
                                   float('-inf'), None, 3])
def test_numbers_and_other_cells_stay(value):
    assert guard_cell(value) is value


def test_predictions_and_figures_hold_no_formula(tmp_path):
    file = io.BytesIO()
    writer = CsvWriter(file, ['=HYPERLINK("http://x")', '-0.5', 'cat'], top_k=3, extra=['error'])
    writer.write(Prediction(0, '@photo.jpg', [0, 1, 2], [0.5, 0.3, 0.2], reason=''))
    row = list(csv.DictReader(io.StringIO(file.getvalue().decode())))[0]
    assert row['file'] == "'@photo.jpg" and row['class_1'] == '\'=HYPERLINK("http://x")'
    assert row['class_2'] == '-0.5' and row['class_3'] == 'cat' and row['probability_1'] == '0.500000'
    metrics.write_results(str(tmp_path / 'r.csv'), [{'checkpoint': '=a.pth', 'loss': -0.5}])
    assert (tmp_path / 'r.csv').read_text() == "checkpoint,loss\n'=a.pth,-0.5\n"


# ---- a closed terminal or log

OUTPUTS = {'a full disk': '>/dev/full', 'closed': '>&-', 'a reader that leaves': '| head -n 1',
           'both closed': '>&- 2>&-', 'both full': '>/dev/full 2>&1'}


@pytest.mark.parametrize('where', OUTPUTS)
@pytest.mark.parametrize('processes', (1, 2))
def test_training_continues_without_its_output(data, tmp_path, where, processes):
    if not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full')
    output = str(tmp_path / 'output')
    command = [sys.executable] + (['-m', 'beit.distributed.launcher', '--nproc_per_node=2'] if processes == 2 else [])
    done = subprocess.run(
        ['bash', '-c', '"$@" %s; exit "${PIPESTATUS[0]}"' % OUTPUTS[where], 'bash'] + command + [PROGRAM] + RUN
        + ['--data_path=' + data, '--output_dir=' + output, '--epochs=2', '--warmup_epochs=0'],
        cwd=os.path.dirname(PROGRAM), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        timeout=200, env=environment(OMP_NUM_THREADS='1', **COLD))
    assert done.returncode == 0, done.stderr
    assert [line['epoch'] for line in lines_of(output)] == [0, 1]
    assert {'checkpoint-1.pth', 'checkpoint-best.pth', 'summary.json'} <= set(os.listdir(output))
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr
    if where in ('a full disk', 'a reader that leaves'):
        assert done.stderr.count('standard output is gone') == 1, done.stderr
    else:
        assert done.stderr == ''


@pytest.mark.parametrize('where', ['a reader that leaves', 'a full disk'])
def test_a_script_writes_its_log_when_its_output_is_closed(data, tmp_path, where):
    checkout = copy_checkout(str(tmp_path / 'beit'))
    done = subprocess.run(
        ['bash', '-c', 'bash test/train_full_1p.sh "$@" %s; exit "${PIPESTATUS[0]}"' % OUTPUTS[where], 'bash',
         '--data_path=' + data] + TINY, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=200, env=environment(OMP_NUM_THREADS='1', PYTHON=sys.executable))
    assert done.returncode == 0, done.stderr
    logs = os.path.join(checkout, 'test', 'output', '0')
    assert re.search(r'^Result: ', text(os.path.join(logs, 'train_0.log')), re.M)
    assert 'ActualFPS' in text(os.path.join(logs, 'beit_nano_patch8_32_bs4_1p_acc.log'))
    assert os.path.isfile(os.path.join(checkout, 'train_result', 'checkpoint-best.pth'))
    assert done.stderr.splitlines()[-1].endswith('standard output fails; the result is in %s' % os.path.join(
        logs, 'beit_nano_patch8_32_bs4_1p_acc.log'))
    assert 'echo' not in done.stderr
    if where == 'a full disk':
        help = subprocess.run(['bash', '-c', 'bash test/train_full_1p.sh --help >/dev/full'], cwd=checkout,
                              stderr=subprocess.PIPE, universal_newlines=True)
        assert help.returncode == 2 and 'the help cannot be printed' in help.stderr


# ---- figures that nothing else holds

LOST = {'a full disk': '>/dev/full', 'closed': '>&-'}


def lost(where, *command):
    """The one line on standard error of a command whose output is lost; it ends with status 2."""
    done = subprocess.run(['bash', '-c', '"$@" %s' % LOST[where], 'bash', sys.executable, *command], timeout=100,
                          cwd=os.path.dirname(PROGRAM), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env=environment(OMP_NUM_THREADS='1', **COLD))
    assert done.returncode == 2, done.stderr
    line, = [line for line in done.stderr.splitlines() if not re.match('.*: beit_nano_patch8_32, ', line)]
    assert 'error: ' in line and 'standard output' in line
    return line


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    output = str(tmp_path_factory.mktemp('trained') / 'out')
    assert run_class_finetuning.run(TINY + ['--data_path=' + data, '--output_dir=' + output]) == 0
    return output


@pytest.mark.parametrize('where', LOST)
def test_what_cannot_be_printed_is_an_error(data, trained, where):
    evaluation = ['run_class_finetuning.py', '--eval', '--resume', trained, '--data_path', data, '--num_workers=0']
    assert 'the figures of the evaluation' in lost(where, *evaluation)
    assert 'the result of --check_data' in lost(where, evaluation[0], '--check_data', *evaluation[4:])
    for program in ('run_class_finetuning.py', 'run_predict.py', 'run_export.py', 'average_checkpoints.py',
                    'run_linear_eval.py'):
        assert 'the help' in lost(where, program, '--help')
    lost(where, 'run_predict.py', '--resume', trained, data)


def test_bad_images_that_cannot_be_printed_are_an_error(image_folder):
    root = image_folder()
    with open(os.path.join(root, 'train', 'cat', '000.png'), 'wb') as file:
        file.write(b'no image')
    lost('a full disk', 'run_class_finetuning.py', '--check_data', '--data_path', root, '--num_workers=0')


def test_figures_in_a_file_need_no_output(data, trained, tmp_path):
    file = tmp_path / 'r.csv'
    done = subprocess.run(
        ['bash', '-c', '"$@" >/dev/full', 'bash', sys.executable, PROGRAM, '--eval', '--resume', trained,
         '--data_path', data, '--num_workers=0', '--results_file', str(file)], stderr=subprocess.PIPE,
        env=environment(OMP_NUM_THREADS='1'), universal_newlines=True, timeout=100)
    assert done.returncode == 0 and done.stderr.count('standard output is gone') == 1, done.stderr
    assert len(file.read_text().splitlines()) == 2
