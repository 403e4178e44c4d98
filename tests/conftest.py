"""Hooks and fixtures: recorded figures, small data sets, the NPU emulator. Functions to import are in helpers.py."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault('OMP_NUM_THREADS', '1')  # as in run_tests.sh: threads slow the tiny models down

import numpy as np
import pytest
import torch
from PIL import Image

import run_class_finetuning
from helpers import EMULATOR, TEST_DIR, cannot_run, photo, python, run_program  # first: it adds ROOT to the path

# Keep indexes of the tests' folders out of the user's cache, which only holds slow downloads and builds.
_caches = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
os.environ.setdefault('TORCH_NPU_WHEELS', os.path.join(_caches, 'beit_torch_npu_wheels'))
os.environ.setdefault('MPLCONFIGDIR', os.path.join(_caches, 'matplotlib'))
_own_cache = tempfile.TemporaryDirectory()
os.environ['XDG_CACHE_HOME'] = _own_cache.name

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ['npu_emulator']  # its tests run in a separate process, where torch_npu is the emulator

# The slowest files start first; otherwise one core would run them alone at the end.
LONGEST = ['test_ascend', 'test_scripts', 'test_end_to_end', 'test_faults', 'test_distributed', 'test_multinode',
           'test_dist_faults', 'test_fuzz_flags', 'test_disk', 'test_benchmark', 'test_report', 'test_predict',
           'test_export', 'test_stacks', 'test_docs']


@pytest.hookimpl(trylast=True)  # when the terminal reporter is there
def pytest_configure(config):
    if hasattr(config.option, 'loadscopereorder'):  # of pytest-xdist: by the number of tests
        config.option.loadscopereorder = False
    terminal = config.pluginmanager.get_plugin('terminalreporter')
    if config.option.verbose == -1 and terminal is not None and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(FileProgress(terminal))


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.module.__name__.rpartition('.')[2], len(LONGEST)))


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item):
    for mark in item.iter_markers('needs'):
        need, is_met, reason = mark.args
        if not is_met:
            cannot_run(need, reason)
    if item.get_closest_marker('soak') and not os.environ.get('BEIT_SOAK'):
        cannot_run('soak', 'another way through the same code; bash test/run_tests.sh --soak has it')


class FileProgress:
    """With -q: instead of dots, one line per test file after its last test; failures immediately."""

    def __init__(self, terminal):
        self.terminal, self.left, self.outcomes, self.seconds = terminal, {}, {}, collections.Counter()
        self.done = 0

    def pytest_collection_finish(self, session):
        self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):  # the same on every worker
        self.expect(ids)

    def expect(self, ids):
        if not self.left:
            self.left = collections.Counter(each.partition('::')[0] for each in ids)
            self.files = len(self.left)

    def pytest_report_teststatus(self, report):
        if report.passed:
            return ('passed' if report.when == 'call' else ''), '', ''
        category = 'skipped' if report.skipped else 'failed' if report.when == 'call' else 'error'
        return category, '', ''

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition('::')[0]
        self.seconds[file] += report.duration
        if report.failed:
            self.terminal.write_line('FAILED %s (%s)' % (report.nodeid, report.when))
        if report.when == 'call' or not report.passed:
            self.outcomes.setdefault(file, collections.Counter())[report.outcome] += 1
        if report.when == 'teardown':
            self.left[file] -= 1
            if not self.left[file]:
                self.done += 1
                counts = ', '.join('%d %s' % (count, outcome) for outcome, count in sorted(self.outcomes[file].items()))
                self.terminal.write_line('[%d/%d] %s: %s in %.0f s' % (
                    self.done, self.files, file, counts, self.seconds[file]))


def pytest_terminal_summary(terminalreporter):
    """One line per skip reason, with the number of tests."""
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get('skipped', ()))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line('%d test%s skipped: %s' % (count, 's' if count > 1 else '',
                                                               reason.replace('Skipped: ', '')), yellow=True, bold=True)


@pytest.fixture
def golden():
    """golden('trajectory.npz') or golden('param_groups.json'): recorded outputs of the reference implementation."""
    def load(name):
        path = os.path.join(TEST_DIR, 'golden', name)
        if name.endswith('.npz'):
            return np.load(path)
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    return load


@pytest.fixture
def parse():
    """parse('--lr=1', …): the program's own namespace of flags."""
    return lambda *flags: run_class_finetuning.build_parser().parse_args(list(flags))


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(train=16, val=6, classes=('a', 'b'), size=(32, 32)): a path with a space, train/ and val/ in it."""
    def make(train=16, val=6, classes=('cat', 'dog'), size=(32, 32), name='my data', suffix='.png'):
        root = tmp_path / name
        for split, count in (('train', train), ('val', val)):
            for label, class_name in enumerate(classes):
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for index in range(count):
                    photo(1000 * label + index + (500 if split == 'val' else 0), *size).save(
                        str(folder / ('%03d%s' % (index, suffix))))
        return str(root)
    return make


@pytest.fixture
def program():
    return run_program


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Two classes of different tints that a tiny model can half learn: 32 training and 22 validation images."""
    root = tmp_path_factory.mktemp('small') / 'my data'
    for split, count in (('train', 16), ('val', 11)):
        for label, (name, tint) in enumerate((('cat', (150, 90, 60)), ('dog', (90, 120, 150)))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture = photo(1000 * label + index + (500 if split == 'val' else 0), 32, 32)
                Image.blend(picture, Image.new('RGB', picture.size, tint), 0.3).save(str(folder / ('%03d.png' % index)))
    return str(root)


@pytest.fixture
def refused(capsys):
    """refused(flags, words…): the program prints one line with all the words and exits with 2."""
    def check(flags, *words):
        assert run_class_finetuning.run(flags) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and 'Traceback' not in err, err
        for word in words:
            assert word in err, (word, err)
    return check


@pytest.fixture
def public_folder():
    """A folder that every user can access, unlike pytest's own."""
    folder = tempfile.mkdtemp(dir='/tmp')
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope='session')
def emulator():
    """emulator(apex='ascend', FAKE_NPU_SOC='910A'): an environment with emulated NPUs. Built on first use."""
    if not hasattr(torch, 'accelerator'):
        cannot_run('emulator', 'the NPU emulator needs PyTorch 2.6 or newer')
    if shutil.which(os.environ.get('CXX', 'g++')) is None:
        cannot_run('compiler', 'no C++ compiler (g++) to build the NPU emulator with')

    def environment(apex=None, **more):
        path = [EMULATOR] + ([os.path.join(EMULATOR, 'apex_' + apex)] if apex else [])
        return dict({'PYTHONPATH': os.pathsep.join(path), 'ASCEND_HOME_PATH': EMULATOR, 'OMP_NUM_THREADS': '1',
                     'CUDA_VISIBLE_DEVICES': '', 'PYTHON_EXEC': python()}, **more)

    subprocess.run([sys.executable, '-c', 'import torch_npu'], check=True, env=dict(os.environ, **environment()))
    return environment
