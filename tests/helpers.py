"""Shared by the tests: flags of a tiny run, needs, images, toy models, and helpers that start program and scripts.

Tests import from this module, never from each other or from conftest.py, which has the fixtures and hooks.
"""

import atexit
import collections
import contextlib
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from functools import lru_cache

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

TEST_DIR = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TEST_DIR)
EMULATOR = os.path.join(TEST_DIR, 'npu_emulator')
sys.path.insert(0, ROOT)

import modeling_finetune  # noqa: E402
from beit.data.loader import Batch
from beit.files import run_folder
from beit.training import step_control
import warm_python
from trajectory import Batches, check_trajectory, trajectory_run  # noqa: F401

# Curves take a second per run; test_report.py draws them.
NANO = ['--no_curves', '--model=beit_nano_patch8_32', '--input_size=32', '--num_workers=0', '--device=cpu']
LAUNCHER = ['-m', 'beit.distributed.launcher']  # run by Python in the root, followed by its options, PROGRAM and flags
PROGRAM = os.path.join(ROOT, 'run_class_finetuning.py')
RUN = ['--no_curves', '--model=beit_nano_patch8_32', '--input_size=32', '--num_workers=0', '--device=cpu',
       '--warmup_epochs=0', '--batch_size=8', '--aa=none', '--layer_scale_init_value=0', '--init_scale=1',
       '--abs_pos_emb', '--disable_rel_pos_bias']
# A Python started as users start it, for the scripts and torchrun's processes: see warm_python.py.
COLD = {'PYTHON': sys.executable, 'PYTHON_EXEC': sys.executable}
CPU = torch.device('cpu')
TINY = NANO + ['--batch_size=4', '--epochs=1', '--warmup_epochs=0', '--finetune=', '--lr=1e-3']
LONG = ['--epochs=100000', '--no_save_ckpt', '--disable_eval_during_finetuning']  # until it is ended
BLOCK = re.compile(r'-{18} Final result -{18}\n'
                   r'Final Performance images/sec : (?P<fps>\d+\.\d\d)\n'
                   r'Final Train Accuracy : (?P<accuracy>\d+\.\d{3}|n/a)\n'
                   r'E2E Training Duration sec : (?P<seconds>\d+)\n\Z')
SUMMARY_NAMES = ['Network', 'RankSize', 'BatchSize', 'DeviceType', 'CaseName', 'ActualFPS', 'TrainingTime',
                 'TrainAccuracy', 'ActualLoss', 'E2ETrainingTime']
SUFFIX = {'full': 'acc', 'performance': 'perf', 'eval': 'eval'}
LOG = {'full': 'train_0', 'performance': 'train_0_perf', 'eval': 'train_0_eval'}
Run = collections.namedtuple('Run', 'status out err')


def cannot_run(need, reason):
    """Skip the running test with one line, or fail it if MUST_RUN names the need (see test/run_tests.sh).

    `pytest.mark.needs(need, is_met, reason)` does the same for a need that is known before the test runs.
    """
    if need in os.environ.get('MUST_RUN', '').split():
        pytest.fail('%s, and MUST_RUN names %s' % (reason, need))
    pytest.skip('NOT RUN: ' + reason)


def needs_extra(*modules):
    """A mark for tests that need packages of requirements-extra.txt, named as they are imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.needs('extras', not missing, 'it needs %s, of requirements-extra.txt' % ', '.join(missing))


has_proc = pytest.mark.needs('linux', os.path.isdir('/proc/self'), 'processes are found through /proc')


def photo(seed, width=96, height=72):
    """A smooth picture with some noise, with the statistics of a photograph."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(np.int64) + rng.randint(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_images(root, classes=('cat', 'dog'), train=8, val=4, size=(32, 32)):
    for split, count in (('train', train), ('val', val)):
        for name in classes:
            folder = os.path.join(str(root), split, name)
            os.makedirs(folder)
            for index in range(count):
                photo(index, *size).save(os.path.join(folder, '%d.png' % index))
    return str(root)


def write_cifar(root, monkeypatch):
    """Write a small archive in CIFAR-100's layout and patch torchvision's checksums. Returns each split's content."""
    folder = root / 'cifar-100-python'
    folder.mkdir()
    rng = np.random.RandomState(0)
    names = ['class_%02d' % number for number in range(100)]
    content = {split: {'data': rng.randint(0, 256, (count, 3072)).astype(np.uint8),
                       'fine_labels': rng.randint(0, 100, count).tolist(), 'coarse_labels': [0] * count,
                       'filenames': ['%d.png' % index for index in range(count)], 'batch_label': split}
               for split, count in (('train', 12), ('test', 7))}
    content['meta'] = {'fine_label_names': names, 'coarse_label_names': ['coarse_%d' % n for n in range(20)]}
    sums = {}
    for name, value in content.items():
        data = pickle.dumps(value, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    cls = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cls, 'train_list', [['train', sums['train']]])
    monkeypatch.setattr(cls, 'test_list', [['test', sums['test']]])
    monkeypatch.setattr(cls, 'meta', {'filename': 'meta', 'key': 'fine_label_names', 'md5': sums['meta']},
                        raising=False)
    return content


def lines_of(output_dir):
    with open(os.path.join(output_dir, 'log.txt'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def summaries(folder):
    """(step, value) of a TensorBoard folder, by tensorboardX's own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event
    for path in glob.glob(os.path.join(folder, '*tfevents*')):
        with open(path, 'rb') as file:
            data = file.read()
        while data:
            length = struct.unpack('<Q', data[:8])[0]
            event, data = Event.FromString(data[12:12 + length]), data[16 + length:]
            for value in event.summary.value:
                yield event.step, value


def scalars(folder):
    """Tag to values of a TensorBoard folder."""
    found = {}
    for _, value in summaries(folder):
        found.setdefault(value.tag, []).append(value.simple_value)
    return found


def toy(classes=3, **options):
    torch.manual_seed(0)
    model = modeling_finetune.beit_nano_patch8_32(num_classes=classes, init_scale=1., **options)
    loader = Batches([(torch.randn(4, 3, 32, 32), torch.randint(0, classes, (4,))) for _ in range(4)])
    return model, loader


class Numbered(list):
    """Batches with the images' data set indices; it remembers the newest."""

    newest = None

    def __iter__(self):
        for number, (images, targets) in enumerate(list.__iter__(self)):
            self.newest = torch.arange(number * len(images), (number + 1) * len(images))
            yield Batch(images, targets, self.newest, [])


class Listener(step_control.CheckpointMonitor):
    """Names images by their indices, and keeps the reports."""

    def __init__(self, on_nonfinite):
        super().__init__()
        self.on_nonfinite, self.records = on_nonfinite, []

    def name_images(self, indices):
        return ['image-%d' % index for index in indices]

    def write_report(self, record):
        self.records.append(record)
        return ''


@lru_cache(maxsize=None)
def python():
    """A Python for the tests' processes that has already imported the packages: see warm_python.py.

    With --soak it is an ordinary Python. Tests of the differences that warm_python.py lists always use an ordinary one.
    """
    if os.environ.get('BEIT_SOAK') or not sys.platform.startswith('linux'):
        return sys.executable
    folder = tempfile.TemporaryDirectory()
    server, program = warm_python.start(folder.name)

    def end():
        server.stdin.close()
        server.wait(60)
        folder.cleanup()

    atexit.register(end)
    return program


def run_program(*flags, timeout=300, env=None, cwd=ROOT):
    """run_class_finetuning.py in a separate process: (exit status, standard output, standard error)."""
    result = subprocess.run([python(), PROGRAM] + list(flags), cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout,
                            env=dict(os.environ, **(env or {})))
    return result.returncode, result.stdout, result.stderr


def assert_one_line(status, out, err, says):
    assert status == 2, err
    assert 'Traceback' not in out + err
    assert len(err.splitlines()) == 1 and err.endswith('\n'), err
    assert 'error: ' in err
    for part in says:
        assert part in err, '%r is not in: %s' % (part, err)


@contextlib.contextmanager
def as_nobody():
    """Drop root's rights, which bypass every permission."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def marked(mark):
    """{pid: environment} of the living processes that were started with MARK=mark."""
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            env = warm_python.environment_of(pid)
            if env.get('MARK') == mark:
                found[int(pid)] = env
    return found


def all_end(mark, seconds=10):
    until = time.time() + seconds
    while marked(mark) and time.time() < until:
        time.sleep(0.2)
    return not marked(mark)


def copy_checkout(folder):
    """Copy the repository's files into `folder`: tracked and new ones, without the outputs of earlier runs."""
    try:
        names = subprocess.check_output(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                                        cwd=ROOT, stderr=subprocess.DEVNULL).decode().split('\0')
    except (OSError, subprocess.CalledProcessError):
        names = []  # a source archive, or a machine without git
    if not any(names):
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
            '.git', '.venv*', 'data', 'train_result*', 'output', 'prof', '__pycache__', '.*_cache', '*.pth'))
        return folder
    for name in names:
        source, target = os.path.join(ROOT, name), os.path.join(folder, name)
        if os.path.isfile(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy2(source, target)
    return folder


def environment(**changes):
    """This process's environment with changes; add **COLD where warm_python.py lists a difference."""
    env = {name: value for name, value in os.environ.items()
           if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    return dict(env, **dict({'PYTHON': python(), 'PYTHON_EXEC': python()}, **changes))


def start_script(checkout, script, *flags, where='', **env):
    """Start test/<script>.sh from the root, or from test/ with where='test'."""
    path = os.path.join('' if where else 'test', script + '.sh')
    return subprocess.Popen(['bash', path] + list(flags), cwd=os.path.join(checkout, where), env=environment(**env),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True)


def run_script(checkout, script, *flags, where='', timeout=300, **env):
    process = start_script(checkout, script, *flags, where=where, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Run(process.returncode, out, err)


def output(checkout, name=''):
    return os.path.join(checkout, 'test', 'output', '0', name)


def text(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def result(run):
    """The figures of the final block, which must be the last output of a run."""
    assert run.status == 0, run.out + run.err
    found = BLOCK.search(run.out)
    assert found, run.out
    return found.groupdict()


def summary(checkout, case):
    """The summary file's figures, by name; exactly the ten lines, in their order."""
    lines = text(output(checkout, case + '.log')).splitlines()
    pairs = [line.split(' = ') for line in lines]
    assert [pair[0] for pair in pairs] == SUMMARY_NAMES
    figures = dict(pairs)
    assert figures['CaseName'] == case
    return figures


def check_summary(checkout, script, run, batch_size, devices, model='beit_nano_patch8_32'):
    """The file is where tools look for it; its figures are bare numbers and agree with the block."""
    kind = script.split('_')[1]
    block = result(run)
    figures = summary(checkout, '%s_bs%d_%dp_%s' % (model, batch_size, devices, SUFFIX[kind]))
    assert os.path.isfile(output(checkout, LOG[kind] + '.log'))
    assert (figures['Network'], figures['RankSize'], figures['BatchSize'], figures['DeviceType']) \
        == (model, str(devices), str(batch_size), platform.machine())
    assert (figures['ActualFPS'], figures['TrainAccuracy'], figures['E2ETrainingTime']) \
        == (block['fps'], block['accuracy'], block['seconds'])
    assert re.match(r'\d+\.\d\d$', figures['ActualFPS']) and float(figures['ActualFPS']) > 0
    assert re.match(r'\d+\.\d{3}$', figures['TrainingTime'])
    assert re.match(r'\d+\.\d{4}$', figures['ActualLoss'])
    assert re.match(r'\d+$', figures['E2ETrainingTime'])
    if kind == 'performance':
        assert figures['TrainAccuracy'] == 'n/a'  # nothing is evaluated
    else:
        assert 0 <= float(figures['TrainAccuracy']) <= 100
    if kind != 'eval':  # its last batch is smaller
        fps = float(figures['ActualFPS'])
        assert float(figures['TrainingTime']) \
            == pytest.approx(1000. * batch_size * devices / fps, rel=0.01 / fps + 1e-4)  # both are rounded
    assert float(figures['TrainingTime']) < 1000 * (int(figures['E2ETrainingTime']) + 1)
    return figures


def fails(run, *expected):
    """A user error: status 2, an error line with the expected words, no traceback, no result."""
    assert run.status == 2, run.out + run.err
    assert 'Final result' not in run.out
    assert 'Traceback' not in run.out + run.err
    errors = [line for line in (run.out + run.err).splitlines() if 'error: ' in line]
    assert len(errors) == 1, run.out + run.err
    for words in expected:
        assert words in errors[0]


def fake_cann(tmp_path, package):
    """Write a CANN folder with an environment script such as `package`/set_env.sh. Returns the file that names it."""
    folder = tmp_path / 'opt' / 'my Ascend' / package
    (folder / 'latest').mkdir(parents=True)
    (folder / 'set_env.sh').write_text(  # like the real one, it reads variables that may be unset
        'export ASCEND_HOME_PATH="%s" FAKE_CANN=%s LD_LIBRARY_PATH=/cann:$LD_LIBRARY_PATH:$NOT_SET\n'
        % (folder / 'latest', package))
    info = tmp_path / 'ascend_cann_install.info'
    info.write_text('Version=1.0\nInstall_Path=%s\n' % folder.parent)
    return str(info)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_launcher(*flags, nnodes=2, node_rank=0, port=None, address='127.0.0.1', processes=1, prefix=(), **env):
    """Start the scripts' launcher as one of several machines."""
    options = ['--nnodes=%d' % nnodes, '--node_rank=%d' % node_rank, '--nproc_per_node=%d' % processes]
    options += ['--master_addr=' + address, '--master_port=%d' % port] if port else []
    env = environment(OMP_NUM_THREADS='1', **env)
    return subprocess.Popen(list(prefix) + [env['PYTHON']] + LAUNCHER + options + [PROGRAM] + RUN + list(flags),
                            cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True)


def ends(processes, seconds=60):
    """The results of all processes, which must end within `seconds`."""
    until = time.time() + seconds
    try:
        return [Run(process.returncode, *streams) for process, streams in
                [(each, each.communicate(timeout=max(until - time.time(), 1))) for each in processes]]
    finally:
        for process in processes:
            process.kill()


def launch(processes, *flags, timeout=240, preset=RUN):
    """The scripts' launcher with this many `processes`: (exit status, standard output, standard error)."""
    result = subprocess.run(
        [python()] + LAUNCHER + ['--nproc_per_node=%d' % processes, PROGRAM] + list(preset) + list(flags), cwd=ROOT,
        timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHON_EXEC=python()))
    return result.returncode, result.stdout, result.stderr


with_export = pytest.mark.needs('current', hasattr(getattr(torch, 'export', None), 'Dim'), 'it needs torch.export')
with_dynamo = pytest.mark.needs('current', 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters,
                                'it needs the exporter of PyTorch 2')


def shake(model, seed=0):
    """Give every weight a distinct value, because tables and biases start at zero and gammas are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_random_weights(path, args, classes, **more):
    """(the path, the network) of a checkpoint, written with random weights, flags and class names."""
    from beit.checkpoint import inference_model
    from beit.files import weights_file
    model = shake(inference_model.build_model(args, len(classes)))
    weights_file.save(path, dict({'model': model.state_dict(), 'args': vars(args), 'classes': classes}, **more))
    return path, model


@contextlib.contextmanager
def holder(folder, with_child=False):
    """The ids of a process that holds a folder's lock until it is killed, and of its child."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with run_folder.locked(folder):
                child = os.fork() if with_child else -1
                if child:
                    os.write(write, b'%d\n' % child)
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as file:
        child = int(file.readline())
    try:
        yield pid, child
    finally:
        for each in (pid, child):
            with contextlib.suppress(OSError):
                if each > 0:
                    os.kill(each, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(pid, 0)
