"""What the tests share: the recorded figures, small data sets made on the spot, and the program as a subprocess."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TEST_DIR)
sys.path.insert(0, ROOT)

import run_class_finetuning  # noqa: E402

collect_ignore = ['npu_emulator']  # its tests run in a process of their own, where torch_npu is the emulator

NANO = ['--model=beit_nano_patch8_32', '--input_size=32', '--num_workers=0', '--device=cpu']


def cannot_run(need, reason):
    """End a test that this machine can't run: skipped with one loud line, or failed where MUST_RUN names the need.

    .ci/run sets MUST_RUN to the needs that it found met (compiler, openssl, stacks), so that nothing is skipped there
    without anybody noticing.
    """
    if need in os.environ.get('MUST_RUN', '').split():
        pytest.fail('%s, and MUST_RUN names %s' % (reason, need))
    pytest.skip('NOT RUN: ' + reason)


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
