"""Faults in one of several processes: it dies, hangs, or gets a non-finite loss or a bad file; a network breaks.

In every case the job exits non-zero soon after --dist_timeout, names the process and the cause in its last lines, and
leaves no process and no incomplete file.

Most jobs are forked from one Python that has already imported the program: a start is instant, and a --dist_timeout of
five seconds is enough.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from beit.checkpoint import discovery
from beit.data import image_dataset, loader
from beit.files import weights_file
from helpers import (
    COLD,
    LONG,
    ROOT,
    RUN,
    all_end,
    cannot_run,
    ends,
    free_port,
    has_proc,
    lines_of,
    marked,
    start_launcher,
)

SECONDS = 5  # --dist_timeout of jobs that hang
SLACK = 12  # seconds after it until every process must be gone, on a busy machine

FORKER = r"""
import ctypes, json, os, signal, subprocess, sys, time
ROOT = %r
sys.path[:0] = [ROOT, os.path.join(ROOT, 'test')]
import run_class_finetuning; from beit.distributed import launcher; from beit.distributed import process_group
import tensorboardX, timm.data, torch.utils.data  # what a run would import later

def become(folder, name, env):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process_group.end_with_parent()
    if name is not None:
        for number, stream in ((1, 'out'), (2, 'err')):
            os.dup2(os.open('%%s/%%s%%s' %% (folder, stream, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if folder:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)

def leave(main, *args):
    status = 1
    try:
        status = main(*args)
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(status or 0)

def program(argv):
    exec(os.environ.get('FAULT_' + os.environ.get('RANK', '0'), ''), {})
    return run_class_finetuning.run(argv)

def fork(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
    self._child_created, self.pid = True, os.fork()
    if not self.pid:
        become(None, None, env)
        sys.stdout = sys.__stdout__  # the launcher's own is put away
        leave(program, args[args.index('run_class_finetuning.py') + 1:])

def start(job, number):
    pid = os.fork()
    if not pid:
        if job['launched']:
            become(job['folder'], '', job['env'])
            launcher.Rank._execute_child = fork
            sys.argv = ['launcher'] + job['launched'] + ['run_class_finetuning.py'] + job['argv']
            leave(launcher.main)
        place = dict(RANK=str(number), LOCAL_RANK=str(number)) if job['processes'] > 1 else {}
        become(job['folder'], number, dict(job['env'], **place))
        leave(program, job['argv'])
    return pid

def keep(job):
    os.setsid()
    process_group.end_with_parent()
    if job['netns'] and ctypes.CDLL(None).setns(os.open('/run/netns/' + job['netns'], os.O_RDONLY), 0x40000000):
        os._exit(1)  # 0x40000000 is CLONE_NEWNET
    numbers = range(1 if job['launched'] else job['processes'])
    pids = {start(job, number): number for number in numbers}
    while pids:
        pid, status = os.wait()
        status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        with open('%%s/ended' %% job['folder'], 'a') as file:
            file.write(json.dumps([pids.pop(pid), status, time.time()]) + '\n')
    os._exit(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped automatically
print('ready', flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        keep(json.loads(line))
    print(pid, flush=True)
"""


Ended = collections.namedtuple('Ended', 'status time out err')


class Job:
    """A running job: `processes` of run_class_finetuning.py, with or without the scripts' launcher."""

    def __init__(self, folder, keeper, launched, processes):
        self.folder, self.keeper, self.launched = folder, keeper, launched
        self.numbers = range(1 if launched else processes)

    def read(self, name):
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            return ''
        with open(path, encoding='utf-8', errors='replace') as file:
            return file.read()

    def ended(self):
        """{number: Ended}; with a launcher only the launcher, with everyone's output."""
        found = {}
        for line in self.read('ended').splitlines():
            number, status, moment = json.loads(line)
            name = '' if self.launched else str(number)
            found[number] = Ended(status, moment, self.read('out' + name), self.read('err' + name))
        return found

    def left(self):
        """The job's living processes, including loaders."""
        return [pid for pid in in_session(self.keeper) if pid != self.keeper]

    def until(self, condition, seconds=60):
        until = time.time() + seconds
        while not condition():
            assert time.time() < until, self.everything()
            time.sleep(0.1)

    def end(self, *numbers, seconds=60):
        """Wait for the listed processes. By default wait for all; then no process may be left."""
        self.until(lambda: set(numbers or self.numbers) <= set(self.ended())
                   and (numbers or not in_session(self.keeper)), seconds)
        ended = self.ended()
        return [ended[number] for number in numbers or self.numbers]

    def everything(self):
        return '\n'.join('%s:\n%s' % (name, self.read(name)) for name in sorted(os.listdir(self.folder)))


def in_session(session):
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/%s/stat' % pid) as file:
                fields = file.read().rpartition(')')[2].split()
        except OSError:
            continue
        if fields[3] == str(session) and fields[0] != 'Z':
            found.append(int(pid))
    return found


@pytest.fixture(scope='module')
def forker():
    process = subprocess.Popen([sys.executable, '-u', '-c', FORKER % ROOT], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, universal_newlines=True,
                               env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert process.stdout.readline() == 'ready\n'
    yield process
    process.stdin.close()
    process.wait(20)


@pytest.fixture
def job(forker, tmp_path):
    """job('--epochs=2', …, launched=True, fault={1: 'Python code for process 1'}): a `Job` of two processes.

    `launched` may be the launcher's options; False starts the processes without a launcher. `netns` is the network
    namespace to start in.
    """
    jobs = []

    def start(*flags, processes=2, launched=False, fault=None, netns='', **env):
        folder = tmp_path / ('job%d' % len(jobs))
        folder.mkdir()
        env = dict({name: value for name, value in os.environ.items() if name not in (
            'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}, OMP_NUM_THREADS='1', **env)
        if processes > 1 and not launched:
            env.update(WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        env.update({'FAULT_%d' % rank: code for rank, code in (fault or {}).items()})
        options = ['--nproc_per_node=%d' % processes] if launched is True else launched
        forker.stdin.write(json.dumps(dict(argv=RUN + list(flags), env=env, processes=processes, launched=options,
                                           folder=str(folder), netns=netns)) + '\n')
        forker.stdin.flush()
        jobs.append(Job(str(folder), int(forker.stdout.readline()), launched, processes))
        return jobs[-1]

    yield start
    for each in jobs:
        for pid in in_session(each.keeper):
            os.kill(pid, signal.SIGKILL)


# ---- one dies or hangs

DEED = """import os, signal, time
def act():
    while not all(map(os.path.exists, %r)):  # a kill while the other process writes them would leave a half file
        time.sleep(0.01)
    with open('fault', 'w') as file:
        file.write(repr(time.time()))
    %s
"""
DEEDS = {'dies': 'os.kill(os.getpid(), signal.SIGKILL)', 'is stopped': 'os.kill(os.getpid(), signal.SIGSTOP)',
         'sleeps': 'time.sleep(1000)'}
PLACES = {  # all but the start in the second epoch
    'starting': """import datasets
def build_datasets(*args, then=datasets.build_datasets):
    act()
    return then(*args)
datasets.build_datasets = build_datasets""",
    'loading': """from beit.data import loader
def get(self, key, get=loader.SeededDataset.__getitem__):
    return act() if key[0] == 1 else get(self, key)
loader.SeededDataset.__getitem__ = get""",
    'training': """import engine_for_finetuning as engine
def set_schedules(optimizer, update_step, *values, then=engine.set_schedules):
    return act() if update_step == 2 else then(optimizer, update_step, *values)
engine.set_schedules = set_schedules""",
    'evaluating': """from beit.data import loader
def indices(self, then=loader.OrderedDistributedSampler.__iter__, first=[0]):
    first.pop() if first else act()
    return then(self)
loader.OrderedDistributedSampler.__iter__ = indices""",
    'saving': """from beit.distributed import watchdog
def enter(stage, then=watchdog.enter_stage, first=['saving a checkpoint']):
    then(stage)
    return stage.startswith('saving') and (first.pop() if first else act())
watchdog.enter_stage = enter""",
}
EPOCHS = ['--epochs=3', '--save_ckpt_freq=1', '--dist_eval', '--dist_timeout=%d' % SECONDS, '--num_workers=1']


def whole(folder):
    """The names of a folder's checkpoints; all must load, and no temporary file may be left."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        assert '.tmp-' not in name
        if name.endswith('.pth'):
            weights_file.load_weights_file(os.path.join(folder, name))
    return [name for name in names if name.startswith('checkpoint-')]


@pytest.fixture
def fall(job, data, tmp_path):
    """fall((1, 'training', 'dies', True), …): yields an ended job for each (process, place, fault, launched).

    After each it checks that the job ended in time and left no incomplete file.
    """
    def start(*rows):
        jobs = []
        for number, (rank, place, deed, launched) in enumerate(rows):
            output = str(tmp_path / ('output%d' % number))
            before = [] if place == 'starting' else [
                os.path.join(output, 'checkpoint-%s.pth' % name) for name in ('0', 'best')]
            fault = DEED % (before, DEEDS[deed]) + PLACES[place]
            one = job('--data_path=' + data, '--output_dir=' + output, *EPOCHS, launched=launched,
                      fault={0: fault, 1: fault} if rank == 'both' else {rank: fault})
            one.until(lambda one=one: one.read('fault'))
            jobs.append((one, output))
        for (rank, _, deed, launched), (one, _) in zip(rows, jobs):
            if deed == 'is stopped' and not launched:  # the other process exits on its own; this one after SIGCONT
                one.end(1 - rank)
                for pid in one.left():
                    with contextlib.suppress(ProcessLookupError):  # it has ended since
                        os.kill(pid, signal.SIGCONT)
        for (rank, place, deed, launched), (one, output) in zip(rows, jobs):
            ended = one.end()
            last = max if launched or deed == 'sleeps' else min  # the processes that must end in time
            seconds = last(each.time for each in ended) - float(one.read('fault'))
            print('%s: %.1f s' % ((rank, place, deed, launched), seconds))
            for each in ended:
                print('  %d %s' % (each.status, '\n    '.join(each.err.splitlines()[-3:])))
            yield rank, one, ended
            assert seconds < SECONDS + SLACK, one.everything()
            assert 'Traceback' not in one.everything()
            epochs = 0 if place == 'starting' else 2 if (rank, place) == (1, 'saving') else 1
            assert [name for name in whole(output) if 'best' not in name] == [
                'checkpoint-%d.pth' % epoch for epoch in range(epochs)]
    return start


def test_a_process_dies(fall):
    for rank, one, ended in fall(*[row + ('dies', launched) for launched in (True, False)
                                   for row in ((1, 'training'), (0, 'training'), (1, 'evaluating'))]):
        if one.launched:
            assert ended[0].status == 137
            assert 'process %d ended with SIGKILL; the others were stopped\n' % rank in ended[0].err
        else:
            assert (ended[rank].status, ended[1 - rank].status) == (-9, 1)
            assert 'lost the connection to process %d, ' % rank in ended[1 - rank].err.splitlines()[-1]


def test_a_process_is_stopped(fall):
    """SIGSTOP stands for a machine or driver that hangs: no output, and no reaction to SIGTERM."""
    for rank, one, ended in fall(*[row + ('is stopped', launched) for launched in (True, False)
                                   for row in ((1, 'starting'), (1, 'training'), (0, 'evaluating'), (1, 'saving'))]):
        guilty, other = (ended[0], ended[0]) if one.launched else (ended[rank], ended[1 - rank])
        assert (guilty.status, other.status) == (1, 1)
        assert re.search(r'^run_class_finetuning.py: error: process %d gives no answer for \d+ s, while process %d '
                         r'was waiting for the other processes; it was stopped or hangs, or its machine or the network '
                         r'is gone \(--dist_timeout 5\)$' % (rank, 1 - rank), other.err, re.M), one.everything()
        if not one.launched:
            assert 'lost the connection to process %d' % (1 - rank) in guilty.err


def test_a_process_hangs(fall):
    """Its watchdog thread reports the hang; so do the waiting processes unless a launcher ends them first."""
    says = [(1, 'starting', 'starting'),
            (1, 'loading', r'waiting for data \(Epoch: \[1\] step 0\)'),
            (0, 'training', r'computing \(Epoch: \[1\] step 0\)'),
            (1, 'evaluating', r'waiting for data \(Test: step 0\)'),
            (0, 'saving', 'saving a checkpoint')]
    rows = [(row, launched) for launched in (True, False) for row in says]
    for ((_, _, what), _), (rank, one, ended) in zip(rows, fall(*[row[:2] + ('sleeps', launched)
                                                                  for row, launched in rows])):
        assert {each.status for each in ended} == {1}
        for each in ended:
            assert len(re.findall(
                r'^run_class_finetuning.py: error: process %d is behind: %s for \d+ s \(at \w+ in [^:]+:\d+\), and '
                r'the others wait \(--dist_timeout 5\)$' % (rank, what), each.err, re.M)) == 1, one.everything()


def test_all_processes_hang(fall):
    for _, one, ended in fall(('both', 'training', 'sleeps', True), ('both', 'training', 'sleeps', False)):
        assert {each.status for each in ended} == {1}
        for each in ended:
            assert len(re.findall(
                r'error: all processes have been computing \(Epoch: \[1\] step 0\) for \d+ s \(at act in [^)]*\); is '
                r'the network between them, or a device, stuck\?', each.err)) == 1, one.everything()


FORKS = """import datasets, os, torch; from beit.distributed import collectives
def build_datasets(*args, then=datasets.build_datasets):
    for _ in range(300):
        collectives.all_gather_json(['text'], torch.device('cpu'))
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    return then(*args)
datasets.build_datasets = build_datasets"""


def test_a_fork_after_a_collective_does_not_hang(job, data):
    """As a loader does: in Python 3.8 a fork hung forever if gloo's thread was freeing NumPy's memory."""
    ended = job('--data_path=' + data, '--maxstep=1', '--dist_timeout=20', fault={0: FORKS, 1: FORKS}).end()
    assert [each.status for each in ended] == [0, 0], ended


FRAMES = """import faulthandler, gc, threading
from beit.distributed import watchdog
faulthandler.dump_traceback_later(60, exit=True)

class Garbage:
    def __init__(self):
        self.cycle, self.local = self, threading.local()
        self.local.number = 1

def look(depth):
    if depth:
        return look(depth - 1)
    gc.set_threshold(100000)
    [Garbage() for _ in range(10)]
    gc.set_threshold(1)  # the next allocation collects it
    for _ in range(3):
        assert watchdog._frame(threading.get_ident()).f_code.co_name == '_frame'
    gc.set_threshold(700)

for _ in range(50):
    thread = threading.Thread(target=look, args=(5,))
    thread.start()
    thread.join()
"""


def test_the_search_for_the_line_of_code_does_not_stop_python():
    """Python 3.11.7 stopped for ever when it collected a threading.local while it made the list of frames."""
    subprocess.run([sys.executable, '-c', FRAMES], cwd=ROOT, check=True)


@has_proc
def test_real_processes(data, tmp_path):
    """Without the forking server: one of the launcher's own processes is stopped together with its loader."""
    job = start_launcher('--data_path=' + data, *LONG, '--num_workers=1', '--dist_timeout=%d' % SECONDS, nnodes=1,
                         processes=2, MARK=str(tmp_path), **COLD)
    try:
        assert any('Epoch: [1]' in line for line in job.stdout)
        for pid in [pid for pid, env in marked(str(tmp_path)).items() if env.get('RANK') == '1']:
            os.kill(pid, signal.SIGSTOP)
    finally:
        run, = ends([job])
    assert run.status == 1, run
    assert 'run_class_finetuning.py: error: process 1 gives no answer for ' in run.err
    assert all_end(str(tmp_path))


# ---- bad data on one process

def errors(ended):
    """The error lines; the lines of processes that the launcher then ended are left out."""
    return [line for line in ended.err.splitlines() if 'error: ' in line and 'interrupted by SIGTERM' not in line]


NOT_A_NUMBER = """from beit.data import device_loader; from beit.data import loader
def prepare(self, batch, then=device_loader.PrefetchLoader.prepare, batches=[]):
    batch = then(self, batch)
    if isinstance(self.dataset, loader.SeededDataset):  # training
        batches.append(batch)
    if len(batches) == 4:  # of the fourth update
        batches.append(None)
        batch.images[5:7] = float('nan')
        with open('images', 'a') as file:
            for index in batch.indices[5:7].tolist():
                file.write(self.dataset.dataset.samples[index][0] + '\\n')
    return batch
device_loader.PrefetchLoader.prepare = prepare"""


SLOW_DISK = """import os; import time
def fsync(handle, then=os.fsync):
    if '.pth' in os.readlink('/proc/self/fd/%d' % handle):
        time.sleep(0.7)
    then(handle)
os.fsync = fsync"""


def test_a_loss_is_not_finite(job, data, tmp_path):
    """On process 1 only: both processes stop, and process 0 completes its save, or both skip the update."""
    faults = {0: SLOW_DISK, 1: NOT_A_NUMBER}
    outputs = [str(tmp_path / mode) for mode in ('stop', 'skip')]
    stops, skips = [job('--data_path=' + data, '--output_dir=' + output, '--epochs=3', '--on_nonfinite=' + mode,
                        launched=True, fault=faults) for output, mode in zip(outputs, ('stop', 'skip'))]
    ended, = stops.end()
    assert ended.status == 2
    print(ended.err)
    error, = errors(ended)
    assert 'error: process 1: the loss is nan at update step 3; ' in error
    assert 'images: %s, %s (all in ' % tuple(stops.read('images').splitlines()) in error

    ended, = skips.end()
    assert ended.status == 0, ended.err
    assert ended.out.count('the loss is nan at update step 3') == 1
    assert [math.isfinite(line['train_loss']) for line in lines_of(outputs[1])] == [True] * 3
    for output, one in zip(outputs, (stops, skips)):
        with open(os.path.join(output, 'nonfinite.txt')) as file:
            assert json.loads(file.read())['images'] == one.read('images').splitlines()
    assert whole(outputs[0]) == ['checkpoint-best.pth']
    assert whole(outputs[1]) == ['checkpoint-2.pth', 'checkpoint-best.pth']


@pytest.fixture
def spoilt(image_folder):
    """spoilt(3): (data folder, paths of its bad files: the first 3 that process 1 of 2 reads)."""
    def make(count):
        root = image_folder(name='data with %d bad' % count)
        sampler = loader.EpochSampler(32, 1, 2, seed=0)
        sampler.set_epoch(0)
        samples = image_dataset.ImageFolder(os.path.join(root, 'train')).samples
        paths = [samples[index][0] for _, index in itertools.islice(sampler, count)]
        for path in paths:
            with open(path, 'wb') as file:
                file.write(b'no image')
        return root, paths
    return make


def test_a_bad_file(job, tmp_path, spoilt):
    """Only in the share of process 1: an error, one skipped file, a whole skipped batch, more than allowed."""
    output = str(tmp_path / 'output')
    flags = ['--epochs=2', '--bad_images=skip', '--max_bad_images=0.3', '--num_workers=1']
    (one, (path,)), (eight, paths) = spoilt(1), spoilt(8)
    error = job('--data_path=' + one, '--epochs=2', '--num_workers=1', launched=True)
    skip = job('--data_path=' + one, '--output_dir=' + output + '1', *flags, launched=True)
    error_ended, = error.end()
    batch = job('--data_path=' + eight, '--output_dir=' + output + '8', *flags, launched=True)
    skip_ended, = skip.end()
    many = job('--data_path=' + eight, '--output_dir=' + output + '0', *flags, '--max_bad_images=0.2', launched=True)
    batch_ended, = batch.end()
    many_ended, = many.end()

    print(error_ended.err, many_ended.err)
    assert error_ended.status == 2
    line, = errors(error_ended)
    assert line.startswith('run_class_finetuning.py: error: process 1: %s: ' % path) and '--bad_images skip' in line
    assert '(cannot identify image file)' in line
    for ended, left_out, folder in ((skip_ended, [path], output + '1'), (batch_ended, paths, output + '8')):
        assert ended.status == 0, ended.err
        assert ended.out.count('Left out: ') == len(left_out)
        with open(os.path.join(folder, 'bad_images.txt')) as file:
            assert sorted(line.partition('\t')[0] for line in file) == sorted(left_out)
        assert whole(folder) == ['checkpoint-1.pth', 'checkpoint-best.pth']
        assert len(lines_of(folder)) == 2
    assert many_ended.status == 2
    too_many, = errors(many_ended)
    assert '--max_bad_images 0.2: 8 of the 32 training images cannot be read' in too_many
    assert 'Traceback' not in ''.join(each.everything() for each in (error, skip, batch, many))


# ---- two machines

NETWORK = '10.231.77.%d'  # addresses that exist only in the namespaces


@pytest.fixture
def machines():
    """The names of two network namespaces, connected by a virtual cable; its device is called cable in both."""
    names = ['beit-%d-%d' % (os.getpid(), node) for node in (0, 1)]

    def ip(*words):
        return subprocess.run(('ip',) + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)

    if shutil.which('ip') is None:
        cannot_run('netns', 'no ip command, to make network namespaces with (iproute2)')
    try:
        commands = [('netns', 'add', name) for name in names]
        commands += [('-n', names[0], 'link', 'add', 'cable', 'type', 'veth', 'peer', 'name', 'cable', 'netns',
                      names[1])]
        for node, name in enumerate(names):
            commands += [('-n', name, 'address', 'add', NETWORK % (node + 1) + '/24', 'dev', 'cable'),
                         ('-n', name, 'link', 'set', 'cable', 'up'), ('-n', name, 'link', 'set', 'lo', 'up')]
        for command in commands:
            done = ip(*command)
            if done.returncode:
                cannot_run('netns', 'this machine makes no network namespaces (%s)' % done.stdout.strip())
        yield names
    finally:
        for name in names:
            ip('netns', 'delete', name)


def test_two_machines_lose_their_connection(job, data, tmp_path, machines):
    """Each side names the lost rank and exits; after the repair the run resumes from its last checkpoint."""
    output = str(tmp_path / 'output')

    def start(*flags):
        return [job('--data_path=' + data, '--output_dir=' + output, '--dist_timeout=%d' % SECONDS, *flags,
                    launched=['--nnodes=2', '--nproc_per_node=1', '--node_rank=%d' % node, '--master_port=29500',
                              '--master_addr=' + NETWORK % 1], netns=name, GLOO_SOCKET_IFNAME='cable')
                for node, name in enumerate(machines)]

    nodes = start('--epochs=100000', '--save_ckpt_freq=1', '--keep_checkpoints=2')
    nodes[0].until(lambda: 'Epoch: [3]' in nodes[0].read('out'))
    subprocess.run(['ip', '-n', machines[1], 'link', 'set', 'cable', 'down'], check=True)
    cut = time.time()
    for rank, node in enumerate(nodes):
        ended, = node.end()
        print('%d after %.1f s: %s' % (ended.status, ended.time - cut, ended.err))
        assert ended.status == 1
        assert ended.time - cut < SECONDS + SLACK
        assert 'run_class_finetuning.py: error: process %d gives no answer for ' % (1 - rank) in ended.err
        assert 'Traceback' not in ended.err
    newest = discovery.list_checkpoints(output)[-1][1]
    whole(output)

    subprocess.run(['ip', '-n', machines[1], 'link', 'set', 'cable', 'up'], check=True)
    epochs = int(re.search(r'checkpoint-(\d+)', newest).group(1)) + 2
    nodes = start('--epochs=%d' % epochs, '--save_ckpt_freq=1', '--auto_resume')
    ended = [node.end()[0] for node in nodes]
    assert [each.status for each in ended] == [0, 0], ended
    assert 'Resumed ' + newest in ended[0].out
    assert [line['epoch'] for line in lines_of(output)] == list(range(epochs))
