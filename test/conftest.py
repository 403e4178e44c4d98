"""What the tests share: the recorded figures, small data sets made on the spot, and the program as a subprocess."""

import collections
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TEST_DIR)
EMULATOR = os.path.join(TEST_DIR, 'npu_emulator')
sys.path.insert(0, ROOT)

import run_class_finetuning  # noqa: E402

# Indexes of the tests' folders don't belong into the user's cache. What takes long to fetch or make again stays there.
_caches = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
os.environ.setdefault('TORCH_NPU_WHEELS', os.path.join(_caches, 'beit_torch_npu_wheels'))
os.environ.setdefault('MPLCONFIGDIR', os.path.join(_caches, 'matplotlib'))
_own_cache = tempfile.TemporaryDirectory()
os.environ['XDG_CACHE_HOME'] = _own_cache.name

collect_ignore = ['npu_emulator']  # its tests run in a process of their own, where torch_npu is the emulator

# Curves take a second of each run; test_report.py draws them.
NANO = ['--no_curves', '--model=beit_nano_patch8_32', '--input_size=32', '--num_workers=0', '--device=cpu']


# The files that take longest, which begin first: with few tests, they would else be last, and keep one core busy alone.
LONGEST = ['test_ascend', 'test_scripts', 'test_end_to_end', 'test_faults', 'test_distributed', 'test_multinode',
           'test_dist_faults', 'test_fuzz_flags', 'test_disk', 'test_benchmark', 'test_report', 'test_predict',
           'test_export', 'test_stacks', 'test_docs']


def pytest_configure(config):
    if hasattr(config.option, 'loadscopereorder'):  # of pytest-xdist: by the number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.module.__name__.rpartition('.')[2], len(LONGEST)))


def cannot_run(need, reason):
    """End a test that this machine can't run: skipped with one loud line, or failed where MUST_RUN names the need.

    .ci/run sets MUST_RUN to the needs that it found met (compiler, openssl, stacks), so that nothing is skipped there
    without anybody noticing.
    """
    if need in os.environ.get('MUST_RUN', '').split():
        pytest.fail('%s, and MUST_RUN names %s' % (reason, need))
    pytest.skip('NOT RUN: ' + reason)


def only_with(need, present, reason):
    """A mark for tests that can run only where something is present: else they are as `cannot_run` has them."""
    if not present and need in os.environ.get('MUST_RUN', '').split():
        return pytest.mark.usefixtures('missing_need')
    return pytest.mark.skipif(not present, reason='NOT RUN: ' + reason)


def needs_extra(*modules):
    """A mark for tests that need packages of requirements-extra.txt, named as they are imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return only_with('extras', not missing, 'it needs %s, of requirements-extra.txt' % ', '.join(missing))


# For the cases that go another way through code that a case beside them goes through already.
variant = only_with('soak', bool(os.environ.get('BEIT_SOAK')),
                    'another way through the same code; bash test/run_tests.sh --soak has it')


@pytest.fixture
def missing_need():
    pytest.fail('what this test needs is not here, and MUST_RUN names it')


def pytest_terminal_summary(terminalreporter):
    """One line for each reason that tests were skipped for, with their number."""
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


def photo(seed, width=96, height=72):
    """A smooth picture with some noise, like a photograph's statistics."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(np.int64) + rng.randint(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


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


def run_program(*flags, timeout=300, env=None, cwd=ROOT):
    """run_class_finetuning.py in a process of its own: (exit status, standard output, standard error)."""
    result = subprocess.run([sys.executable, os.path.join(ROOT, 'run_class_finetuning.py')] + list(flags), cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout,
                            env=dict(os.environ, **(env or {})))
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def program():
    return run_program


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Two classes that a tiny model can half learn: 32 training and 22 validation images, of another tint each."""
    root = tmp_path_factory.mktemp('small') / 'my data'
    for split, count in (('train', 16), ('val', 11)):
        for label, (name, tint) in enumerate((('cat', (150, 90, 60)), ('dog', (90, 120, 150)))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                picture = photo(1000 * label + index + (500 if split == 'val' else 0), 32, 32)
                Image.blend(picture, Image.new('RGB', picture.size, tint), 0.3).save(str(folder / ('%03d.png' % index)))
    return str(root)


@pytest.fixture(scope='session')
def emulator():
    """emulator(apex='ascend', FAKE_NPU_SOC='910A'): the environment in which a command has NPUs. Built on first use."""
    if not hasattr(torch, 'accelerator'):
        cannot_run('emulator', 'the NPU emulator needs PyTorch 2.6 or newer')
    if shutil.which(os.environ.get('CXX', 'g++')) is None:
        cannot_run('compiler', 'no C++ compiler (g++) to build the NPU emulator with')

    def environment(apex=None, **more):
        path = [EMULATOR] + ([os.path.join(EMULATOR, 'apex_' + apex)] if apex else [])
        return dict({'PYTHONPATH': os.pathsep.join(path), 'ASCEND_HOME_PATH': EMULATOR, 'OMP_NUM_THREADS': '1',
                     'CUDA_VISIBLE_DEVICES': ''}, **more)

    subprocess.run([sys.executable, '-c', 'import torch_npu'], check=True, env=dict(os.environ, **environment()))
    return environment
