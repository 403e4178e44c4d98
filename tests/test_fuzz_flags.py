"""Every flag with values that are out of range, of the wrong type, or empty: one line and status 2, or a run."""

import argparse
import os
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_class_finetuning
from beit.devices import kernels
from helpers import RUN

pytestmark = pytest.mark.current_only

SOAK = 20 if os.environ.get('BEIT_SOAK') else 1
SECONDS = 60  # a run of one update takes a fraction of one

WRONG = (
    '', ' ', '0', '-1', '1', '-0', '0.5', '1.5', '1e308', '-1e308', '1e-320', 'nan', 'inf', '-inf', '1e999',
    '99999999999999999999999', '-99999999999999999999999', '0x10', '1_000', '٣', 'true', 'None', 'null', '[]',
    '{}', 'a', 'ä', '\udcff', '\n', 'a\nb', '\t', '--', '-', '=', '%s', '%d%n', '$(touch ran)', '`touch ran`',
    ';touch ran', '__import__("os").system("touch ran")', '../..', '/', '/dev/null', '/dev/zero', '/proc/self/mem',
    '.', '~', '*', 'a' * 5000, '\x00', 'a\x00b', 'http://localhost/x', 'file:///etc/passwd',
    'https://localhost:1/x.pth', 'ftp://a/b', '1 2', '1,2', '0,1', 'cuda', 'cuda:0', 'cuda:-1', 'npu', 'npu:99',
    'cpu:0', 'auto', 'rand-m', 'rand-mX', 'augmix-x', 'v0', 'O3', 'float16', 'dynamic', 'static', 'lookahead_',
    'lookahead_lookahead_sgd', 'fusedadam', 'batch')

# Valid sizes that exceed this machine's memory: outside the scope of this test.
TOO_LARGE = {'num_workers': 2, 'input_size': 64, 'recount': 100}
WORKS = {'log_dir': 'tb', 'output_dir': 'out'}  # names in the test's working folder


def actions():
    parser = run_class_finetuning.build_parser()
    return [(action, flag) for action in parser._actions if action.dest != 'help'
            for flag in action.option_strings if flag.startswith('--')]


def try_flags(flags, capfd):
    """Run the program in this process; a status other than 0 and 2, a traceback or a hang fails."""
    def too_long(*_):
        raise TimeoutError('more than %d s with %r' % (SECONDS, flags))

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        try:
            status = run_class_finetuning.run(flags)
        except SystemExit as end:  # --help
            status = end.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    out, err = capfd.readouterr()
    assert status in (0, 2), (flags, status)
    lines = [line for line in err.splitlines() if line.startswith('run_class_finetuning.py: error: ')]
    assert len(lines) == (status == 2), (flags, err)
    assert 'Traceback' not in out + err, (flags, err)
    if status == 2:
        assert 20 < len(lines[0]) < 12000, lines  # a path of 5000 letters may appear twice
    return status


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_flag_with_wrong_values(image_folder, folder, capfd, monkeypatch):
    monkeypatch.setattr(kernels, 'compile_in_place', lambda *_: None)  # it takes a minute; test_step.py tests it
    data = image_folder(train=4, val=2)
    base = RUN + ['--data_path=' + data, '--epochs=1', '--maxstep=1', '--batch_size=2']
    tried, refused, failures = 0, 0, []

    def attempt(*more):
        nonlocal tried, refused
        tried += 1
        try:
            refused += try_flags(base + list(more), capfd) == 2
        except (Exception, pytest.fail.Exception) as error:
            capfd.readouterr()
            failures.append('%r: %s: %s' % (more, type(error).__name__, str(error)[:300]))

    def sensible(action, text):
        most = TOO_LARGE.get(action.dest)
        try:
            return most is None or not most < float(text) <= 8192
        except ValueError:
            return True

    for action, flag in actions():
        if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
            attempt(flag)
            attempt(flag + '=yes')
            continue
        attempt(flag)  # its value is missing
        for text in WRONG:
            if sensible(action, text):  # noqa: B023  (called within the iteration)
                attempt('%s=%s' % (flag, text))  # noqa: B023
        number = st.one_of(st.integers(), st.floats(), st.text(max_size=12)).map(str)

        @settings(max_examples=3 * SOAK, deadline=None, derandomize=not os.environ.get('BEIT_SOAK'), database=None,
                  suppress_health_check=list(HealthCheck))
        @given(number)
        def any_text(text):
            if sensible(action, text):  # noqa: B023  (called within the iteration)
                attempt('%s=%s' % (flag, text))  # noqa: B023

        any_text()
    assert not failures, '%d of %d:\n%s' % (len(failures), tried, '\n'.join(failures[:40]))
    assert not list(folder.rglob('ran')) and not os.path.exists('ran')  # no value was run
    assert refused > tried / 3
    with capfd.disabled():
        print('\ncommand line: %d values of %d flags tried, %d refused on one line' % (tried, len(actions()), refused))


def test_words_that_are_not_flags(image_folder, folder, capfd):
    base = RUN + ['--data_path=' + image_folder(train=4, val=2), '--epochs=1', '--maxstep=1', '--batch_size=2']
    for words in (['data'], ['--'], ['-'], ['---'], ['-x'], ['--lrr=1'], ['--=1'], ['='], [''], ['--lr'],
                  ['--lr', '--amp'], ['--opt_betas'], ['--opt_betas', '0.9'], ['--cutmix_minmax', '0.5'],
                  ['--lr=1', 'x'], ['--no_lr'], ['--\udcff'], ['--lr\0=1'], ['@/etc/passwd'],
                  ['--model', 'beit', '--model', '']):
        assert try_flags(base + words, capfd) == 2, words
