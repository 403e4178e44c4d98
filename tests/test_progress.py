"""A terminal shows a bar and one line per epoch; a log gets every line."""

import os
import pty
import re
import sys

import pytest

import utils
from beit.distributed import process_group
from beit.log import current_display, format_metrics, start_display
from helpers import NANO, ROOT, copy_checkout, text

pytestmark = pytest.mark.current_only


def on_a_terminal(*command, **env):
    """(exit status, output) of a command whose standard streams are a terminal of unknown size."""
    shown = []

    def read(terminal):
        shown.append(os.read(terminal, 65536))
        return shown[-1]
    before = dict(os.environ)
    os.environ.update(env, TERM='xterm', OMP_NUM_THREADS='1')
    stdin = os.dup(0)
    try:
        with open(os.devnull) as nothing:  # pytest's own standard input can't be read from
            os.dup2(nothing.fileno(), 0)
            status = pty.spawn(list(command), read)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.environ.clear()
        os.environ.update(before)
    return os.WEXITSTATUS(status), b''.join(shown).decode('utf-8')


EPOCH = r'[\r\n]%d/2 +\d\.\d{3} +[\d.]+ %% +[\d.]+ %% +[\d.]+ %% +\d+ +[\d.]+ s\r\n'
TRAINING = ['--epochs=2', '--warmup_epochs=0', '--batch_size=8']


def widest(shown):
    """Columns of the longest line; a path may be longer than the terminal."""
    return max(len(line) for line in re.split(r'[\r\n]+', shown) if '/' not in line.replace('images/s', ''))


def check_terminal(shown):
    """A bar for each epoch and validation, one line after each epoch, a table before, and no line of the log's."""
    assert re.search(r'\rEpoch 1  +\d+%\|.*\| \d/4 <', shown), shown
    for number in (1, 2):
        assert '\rEpoch %d ' % number in shown
        assert len(re.findall(EPOCH % number, shown)) == 1, shown
    assert len(re.findall(r'[\r\n]Epoch +Loss Training Validation +Best Images/s +Time\r\n', shown)) == 1
    assert '\rValidation ' in shown
    assert re.search(r'^Device +cpu, ', shown, re.M) and re.search(r'^Classes +cat, dog\r$', shown, re.M)
    assert re.search(r'^Model +beit_nano_patch8_32, .* 2 classes, input 32x32\r$', shown, re.M)
    assert re.search(r'^Batch +8 per device x 1 x 1 accumulated = 8; 4 updates an epoch, 8 in all\r$', shown, re.M)
    assert not re.search(r'Averaged stats|Epoch: \[|Test:', shown), shown
    end = shown[re.search(EPOCH % 2, shown).end():]  # the last evaluation's, and no other's
    assert re.match(r'\* Acc@1 [\d.]+ loss [\d.]+\r\nAccuracy of the network on the \d+ test images: '
                    r'[\d.]+%\r\nPrecision, recall, F1: macro [^M]*\r\nExpected calibration error [\d.]+%\r\n'
                    r'Max accuracy: [\d.]+%\r\n', end), end
    assert shown.count('* Acc@1') == 1
    assert widest(shown) <= 80


def test_a_program_on_a_terminal(data):
    status, shown = on_a_terminal(sys.executable, os.path.join(ROOT, 'run_class_finetuning.py'), '--data_path=' + data,
                                  *NANO + TRAINING)
    assert status == 0, shown
    check_terminal(shown)
    assert 'Result: images_per_second' in shown


def test_a_narrow_terminal_has_the_figures_and_no_bar(data):
    status, shown = on_a_terminal('bash', '-c', 'stty cols 60 rows 20; exec "$@"', 'bash', sys.executable, os.path.join(
        ROOT, 'run_class_finetuning.py'), '--data_path=' + data, *NANO + TRAINING[:-1], '--batch_size=1')
    assert status == 0, shown
    assert re.search(r'\rEpoch 2  +\d+% <\d\d:\d\d, loss \d\.\d+, acc [\d.]+ %, \d+ images/s', shown), shown
    assert '%|' not in shown and len(re.findall(EPOCH % 2, shown)) == 1 and widest(shown) <= 60


def test_a_script_on_a_terminal_shows_the_bar_and_keeps_the_log(data, tmp_path):
    checkout = copy_checkout(str(tmp_path / 'my code' / 'beit'))
    status, shown = on_a_terminal('bash', os.path.join(checkout, 'test', 'train_full_1p.sh'), '--data_path=' + data,
                                  '--finetune=', *NANO + TRAINING, PYTHON=sys.executable)
    assert status == 0, shown
    check_terminal(shown)
    assert re.search(r'Final Train Accuracy : [\d.]+\r\n', shown)
    log = text(os.path.join(checkout, 'test', 'output', '0', 'train_0.log'))
    assert len(re.findall(r'^Epoch: \[[01]\]  \[[03]/4\]  eta: \S+  lr: ', log, re.M)) == 4
    assert log.count('Averaged stats: ') == 2 and log.count('* Acc@1 ') == 2 and '\nDevice: cpu, ' in log
    assert '%|' not in log and '\n1/2 ' not in log and '\r' not in log


def test_the_text_after_a_bar():
    meters = utils.MetricLogger()
    meters.update(loss=2., class_acc=0.25)
    meters.update(loss=1., class_acc=0.75)
    meters.read()
    assert format_metrics(meters.meters, 123.4) == 'loss 1.500, accuracy 50.0 %, 123 images/s'


def test_an_error_on_a_terminal_starts_a_new_line(data):
    status, shown = on_a_terminal(sys.executable, os.path.join(ROOT, 'run_class_finetuning.py'), '--data_path=' + data,
                                  '--lr=1e30', '--on_nonfinite=stop', *NANO + TRAINING)
    assert status == 2
    assert re.search(r'[\r\n]run_class_finetuning.py: error: the (loss|gradients) ', shown), shown


@pytest.mark.parametrize('env', [{'TERM': 'dumb'}, {'TERM': 'xterm', 'BEIT_TERMINAL': '/nosuch/tty'},
                                 {'TERM': 'xterm', 'BEIT_TERMINAL': os.devnull}])
def test_no_bar_where_there_is_no_terminal_for_it(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    start_display()
    assert current_display().stream is None


def test_only_the_first_process_has_a_bar(monkeypatch):
    monkeypatch.setattr(process_group, 'is_main_process', lambda: False)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setenv('TERM', 'xterm')
    start_display()
    assert current_display().stream is None
