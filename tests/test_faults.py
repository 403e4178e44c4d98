"""A run that is killed at any moment and restarted ends with the same bits as an uninterrupted run.

Each test starts the program on 100 digits, kills it, and restarts the same command until it finishes. Its log.txt
must have the same bytes, and its checkpoints the same numbers, as an uninterrupted run's. The program has no hooks for
this. Run as a script, this file imports the program once and forks a process for each start; a fault wraps a function
(os.fsync, os.replace, …) before the program begins.

BEIT_SOAK=1 (bash test/run_tests.sh --soak) kills 500 times, with a new seed each time.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import run_class_finetuning
from beit.data import locations
from beit.distributed import preemption, process_group
from beit.errors import UserError
from beit.files import weights_file
from helpers import LAUNCHER, NANO, PROGRAM, ROOT, cannot_run, free_port

pytestmark = pytest.mark.needs('linux', os.path.isdir('/proc/self'), 'processes are found through /proc')

STEPS = 'beit.training.step_control.'

SOAK = os.environ.get('BEIT_SOAK', '0') not in ('', '0')
SEED = int(time.time()) if SOAK else 4
KILLS_IN_CI, KILLS_IN_SOAK = 50, 500
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SECONDS = 120  # seconds; a longer run hangs
PAUSE = 0.004

EVERYTHING = NANO[:-2] + [
    '--device=cpu', '--epochs=3', '--warmup_epochs=1', '--lr=4e-3', '--layer_decay=0.8', '--init_scale=1', '--drop=0.1',
    '--attn_drop_rate=0.1', '--drop_path=0.2', '--clip_grad=1', '--weight_decay_end=0.2', '--save_ckpt_freq=1',
    '--keep_checkpoints=2', '--auto_resume']
CONFIGS = {
    'plain': ['--batch_size=16', '--num_workers=0', '--model_ema', '--model_ema_decay=0.8', '--mixup=0.5', '--cutmix=1',
              '--save_ckpt_steps=2'],
    'workers': ['--batch_size=8', '--update_freq=2', '--num_workers=2', '--opt=lookahead_adamw', '--save_ckpt_steps=5',
                '--save_ckpt_freq=2'],
    'halves': ['--batch_size=16', '--num_workers=0', '--amp', '--opt_level=O2', '--loss_scale=dynamic', '--model_ema',
               '--model_ema_decay=0.8', '--save_ckpt_steps=4'],
    'two': ['--batch_size=4', '--update_freq=2', '--num_workers=0', '--model_ema', '--model_ema_decay=0.8',
            '--dist_eval', '--save_ckpt_steps=2', '--dist_timeout=60'],
}
UPDATES = 6  # per epoch, in every test
PROCESSES = {'two': 2}
HAS_HALF_CPU = hasattr(torch, 'autocast')


# ---- server process: forks the runs

def serve():
    """Read and answer orders, one line of JSON each. Forking is safe because no thread runs here."""
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a forked process then copies nothing
    print('ready', flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if 'poll' in order:
            pid, status = os.waitpid(order['poll'], os.WNOHANG)
            answer = None if not pid else -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        else:
            answer = os.fork()
            if not answer:
                return be_run(order)
        print(json.dumps(answer), flush=True)
    return 0


def be_run(order):
    """In the forked process: act as `python run_class_finetuning.py` in a new session."""
    os.setsid()
    process_group.end_with_parent()
    log = os.open(order['log'], os.O_WRONLY | os.O_APPEND)
    for handle in (1, 2):
        os.dup2(log, handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order['env'])
    signal.signal(INT, signal.SIG_DFL)  # no KeyboardInterrupt before the program sets its own handler
    for fault in order['faults']:
        plant(**fault)
    return run_class_finetuning.run(order['flags'])


def plant(call, do, path='', nth=1, when='before', seconds=0.):
    """Wrap a function of the program or of os: its `nth` call on a matching path triggers a fault.

    Args:
        call (str): 'os.replace', 'pilot.CheckpointMonitor.begin_sync', …
        do (int or str): a signal to this process; 'worker': SIGKILL to one of its loaders; 'sleep': for
            `seconds`; 'note': no fault, but every call of pilot.StepState.add appends the batch's indices to the
            file `path`.
        when (str): before, after, or half: before, after truncating the file to fsync to half.
    """
    module, names = re.match(r'((?:[a-z_]+\.)*?[a-z_]+)\.((?:[A-Z]\w*\.)?\w+)$', call).groups()
    owner, names = importlib.import_module(module), names.split('.')
    for name in names[:-1]:
        owner = getattr(owner, name)
    function, calls = getattr(owner, names[-1]), itertools.count(1)

    def wrapped(*args, **kwargs):
        if do == 'note':
            with open(path + os.environ.get('RANK', ''), 'a', encoding='utf-8') as file:
                file.write(json.dumps(args[1].indices.tolist()) + '\n')
            return function(*args, **kwargs)
        hit = re.search(path, subject(args)) is not None and next(calls) == nth
        if hit and when == 'half':
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        if hit and when != 'after':
            strike(do, seconds)
        result = function(*args, **kwargs)
        if hit and when == 'after':
            strike(do, seconds)
        return result
    setattr(owner, names[-1], wrapped)


def subject(args):
    """The paths among a call's arguments; a file descriptor counts as its path."""
    paths = [arg for arg in args if isinstance(arg, str)]
    if not paths and args and type(args[0]) is int:
        paths = [os.readlink('/proc/self/fd/%d' % args[0])]
    return ' '.join(paths)


def strike(do, seconds):
    if do == 'worker':
        os.kill(multiprocessing.active_children()[0].pid, KILL)
        time.sleep(0.3)  # until this process has received its SIGCHLD
    elif do == 'sleep':
        until = time.monotonic() + seconds
        while time.monotonic() < until:  # signals don't shorten it
            time.sleep(0.01)
    else:
        os.kill(os.getpid(), do)


# ---- test process: starts, faults, counts

class Server:

    def __init__(self):
        env = {name: value for name, value in os.environ.items()
               if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)], env=dict(env, OMP_NUM_THREADS='1', PYTHONPATH=ROOT),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True,
            preexec_fn=process_group.end_with_parent)
        assert self.process.stdout.readline() == 'ready\n'

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, 'the process that forks the runs has ended'
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def state_and_session(pid):
    """(state, session id) of a process; state is 'R', 'S', 'Z' for a zombie, …, 'X' after its end."""
    try:
        words = read_bytes('/proc/%s/stat' % pid).rpartition(b')')[2].split()
        return words[0].decode(), int(words[3])
    except OSError:
        return 'X', 0


class Process:
    """One start of the program; its session holds its workers too."""

    def __init__(self, server, log, flags, faults=(), **env):
        self.server, self.log, self.status = server, log, None
        with open(log, 'ab') as file:
            self.begin = file.tell()
        self.pid = server.ask(log=log, flags=flags, faults=list(faults), env=env)

    def poll(self):
        if self.status is None and state_and_session(self.pid)[0] == 'Z':
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def wait(self, seconds=SECONDS):
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(PAUSE)
        return self.status

    def send(self, number, group=False):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def session(self):
        """Ids of the other living processes of its session."""
        found = ((int(name),) + state_and_session(name) for name in os.listdir('/proc') if name.isdigit())
        return [pid for pid, state, session in found if session == self.pid != pid and state not in 'ZX']

    def output(self):
        return read_bytes(self.log)[self.begin:].decode('utf-8', 'replace')


class Tally:
    def __init__(self):
        self.kills = self.resumes = self.losses = 0

    @contextlib.contextmanager
    def may_lose(self):
        """Around comparisons: a failure inside counts as a loss."""
        try:
            yield
        except BaseException:
            self.losses += 1
            raise


TALLY = Tally()


class Life:
    """One run, from its first start until exit status 0, over any number of starts."""

    def __init__(self, server, data, folder, config, *more, processes=None):
        os.makedirs(folder, exist_ok=True)
        self.server, self.folder, self.config, self.out = server, folder, config, os.path.join(folder, 'out')
        self.flags = EVERYTHING + CONFIGS[config] + ['--data_path=' + data, '--output_dir=' + self.out] + list(more)
        self.processes = processes or PROCESSES.get(config, 1)
        self.only_killed, self.running = True, []

    def start(self, *faults, rank=0):
        """Start the command with faults in one of its processes, or in all with rank=None."""
        self.reached, port, self.running = reached(self.out), str(free_port()), []
        for number in range(self.processes):
            env = {} if self.processes == 1 else dict(
                RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(self.processes), MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port)
            self.running.append(Process(self.server, os.path.join(self.folder, 'log-%d' % number), self.flags,
                                        faults if rank in (number, None) else (), **env))

    def wait(self):
        """The exit status of every process. If one failed, end the others as launchers do."""
        begun, failed, steps = time.monotonic(), None, [(0.3, TERM), (3, KILL)]
        while True:
            now, statuses = time.monotonic(), [each.poll() for each in self.running]
            if None not in statuses:
                return statuses
            assert now < begun + SECONDS, 'hangs:\n' + self.story()
            if any(statuses):
                failed = failed or now
                if steps and now > failed + steps[0][0]:
                    _, number = steps.pop(0)
                    for each in self.running:
                        each.send(number)
            time.sleep(PAUSE)

    def attempt(self, *faults, strike=None, rank=0):
        """Start with faults or with `strike(processes)` and wait for the end; return whether the run was killed."""
        self.start(*faults, rank=rank)
        if strike is not None:
            strike(self.running)
        statuses = self.wait()
        killed = statuses != [0] * self.processes
        TALLY.kills += killed
        self.only_killed = self.only_killed and all(status in (0, -KILL) for status in statuses)
        with TALLY.may_lose():
            self.check()
        return killed

    def check(self):
        """Checks after any exit: no orphan or traceback, all files complete, nothing lost, correct messages."""
        for each in self.running:
            until = time.monotonic() + 10  # a new loader process checks for its parent every 5 seconds
            while each.session() and time.monotonic() < until:
                time.sleep(0.02)
            assert not each.session(), 'left over: %s' % each.session()
            assert 'Traceback' not in each.output(), self.story()
        for name in checkpoints(self.out):
            content_of(os.path.join(self.out, name))
        now, output = reached(self.out), self.running[0].output()
        assert now >= self.reached, 'fell back from %s to %s' % (self.reached, now)
        if 'Resumed ' in output:
            TALLY.resumes += 1
            assert 'exactly as if it had not been stopped' in output, self.story()
            assert resumed(output) == self.reached, self.story()
        elif 'Epoch: ' in output:
            assert self.reached == (-1, 0), self.story()
        self.check_words([each.status for each in self.running], output, now)

    def check_words(self, statuses, output, now):
        """The status encodes the signal; the run names its saved file, or reports that it had not begun or was done."""
        stopped = re.search(r'stopped by (SIG\w+) after update (\d+) of epoch (\d+); saved (\S+); the same command',
                            output)
        if stopped:
            number = signal.Signals[stopped.group(1)]
            assert statuses[0] == 128 + number and set(statuses[1:]) <= {128 + number, -TERM}, self.story()
            assert (int(stopped.group(3)) - 1, int(stopped.group(2))) == now and os.path.isfile(stopped.group(4))
            return
        if statuses[0] > 128:
            assert 'interrupted by ' in output or 'ended at once' in output, self.story()
        elif statuses[0] in (-TERM, -INT, -signal.SIGHUP) and self.processes == 1:
            assert 'Flags: ' not in output or 'Training time' in output, self.story()
        elif statuses[0] > 0 and self.processes == 1:
            assert statuses[0] == 1 and output.count('error:') == 1, self.story()
            assert 'error: a loader process ' in output, self.story()

    def finish(self):
        """The last start, without a fault."""
        self.start()
        assert self.wait() == [0] * self.processes, self.story()
        with TALLY.may_lose():
            self.check()
        return self

    def equals(self, other):
        """Check that the files equal an uninterrupted run's."""
        with TALLY.may_lose():
            assert read_bytes(self.out, 'log.txt') == read_bytes(other.out, 'log.txt'), self.story()
            mine, theirs = (set(os.listdir(each.out)) for each in (self, other))
            texts = {'log.txt', 'args.yaml', 'summary.json'}
            assert all(re.match(r'checkpoint-[\w-]+\.pth$', name) for name in mine - texts), mine
            # A signal saves at other updates, and files that the last save did not remove stay.
            needed = theirs if self.only_killed else {name for name in theirs if '-step' not in name}
            assert needed <= mine, 'without %s\n%s' % (sorted(needed - mine), self.story())
            for name in sorted(mine & theirs - texts):
                found = difference(*(content_of(os.path.join(each.out, name)) for each in (self, other)))
                assert not found, '%s: %s\n%s' % (name, found, self.story())
            assert not [name for name in os.listdir(self.folder) if name.startswith('out-')], self.story()

    def story(self):
        """The files and the processes' output, for the report of a failure."""
        files = sorted(os.listdir(self.out)) if os.path.isdir(self.out) else []
        usual = r'(Flags|Device|Precision|Attention|Model|Data|Batch|Test|Epoch|Averaged stats):|\*|Accuracy|Max'
        texts = ['\n'.join(line[:300] for line in read_bytes(log).decode('utf-8', 'replace').splitlines()
                           if not re.match(usual, line)) for log in sorted({each.log for each in self.running})]
        return '%s, %s\n%s\n%s' % (self.config, [each.status for each in self.running], ' '.join(files),
                                   '\n--\n'.join(texts))


def checkpoints(folder):
    return sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else [])
                  if re.match(r'checkpoint-.*\.pth$', name))


@functools.lru_cache(maxsize=60)
def _content(path, *_):
    content = weights_file.load_weights_file(path)
    content['args'] = {name: value for name, value in content['args'].items()
                       if name not in ('output_dir', 'num_workers', 'auto_resume')}
    content['progress'].pop('spent')  # durations
    # PyTorch 1.5 names the parameters by their addresses.
    order = [key for group in content['optimizer']['param_groups'] for key in group['params']]
    for part in {'state', 'slow_state'} & set(content['optimizer']):
        content['optimizer'][part] = [content['optimizer'][part].get(key) for key in order]
    for group in content['optimizer']['param_groups']:
        group['params'] = len(group['params'])
    return content


def content_of(path):
    """The content of a checkpoint that must be equal in two runs. Raises `UserError` for a damaged file."""
    status = os.stat(path)
    return _content(path, status.st_mtime_ns, status.st_ino, status.st_size)


def reached(folder):
    """(completed epochs, updates of the next one) of the furthest complete checkpoint, or (-1, 0)."""
    positions = [(-1, 0)]
    for name in checkpoints(folder):
        with contextlib.suppress(UserError):
            content = content_of(os.path.join(folder, name))
            positions.append((content['epoch'] + 1, content['progress']['steps']))
    return max(positions)


def resumed(output):
    """Where a run said that it went on from."""
    found = re.search(r'Resumed \S+: (?:epoch (\d+) is done|(\d+) updates? of epoch (\d+))', output)
    return (int(found.group(1)), 0) if found.group(1) else (int(found.group(3)) - 1, int(found.group(2)))


def read_bytes(*path):
    with open(os.path.join(*path), 'rb') as file:
        return file.read()


def difference(mine, theirs, place=''):
    """The first place where two checkpoint values differ in a bit, or ''."""
    if type(mine) is not type(theirs):
        return '%s is %s, not %s' % (place, type(mine).__name__, type(theirs).__name__)
    if torch.is_tensor(mine):
        same = mine.dtype == theirs.dtype and mine.shape == theirs.shape \
            and mine.numpy().tobytes() == theirs.numpy().tobytes()
        return '' if same else '%s differs by up to %s' % (place, (mine - theirs).abs().max().item())
    if isinstance(mine, dict):
        if list(mine) != list(theirs):
            return '%s has %s, not %s' % (place, list(mine), list(theirs))
        mine, theirs = list(mine.items()), list(theirs.items())
    if isinstance(mine, (list, tuple)):
        if len(mine) != len(theirs):
            return '%s has %d items, not %d' % (place, len(mine), len(theirs))
        parts = (difference(one, other, '%s/%s' % (place, one[0] if isinstance(one, tuple) and one else index))
                 for index, (one, other) in enumerate(zip(mine, theirs)))
        return next((part for part in parts if part), '')
    return '' if repr(mine) == repr(theirs) else '%s is %r, not %r' % (place, mine, theirs)



# ---- fixtures

@pytest.fixture(scope='module')
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """10 training and 4 validation images of each digit."""
    root = str(tmp_path_factory.mktemp('digits') / 'digits')
    locations.write_digits(root)
    for split, count in (('train', 10), ('val', 4)):
        for folder in os.listdir(os.path.join(root, split)):
            for name in sorted(os.listdir(os.path.join(root, split, folder)))[count:]:
                os.remove(os.path.join(root, split, folder, name))
    return root


@pytest.fixture(scope='module')
def unbroken(server, digits, tmp_path_factory):
    """unbroken('plain'): the uninterrupted run of that configuration; `seconds` is its duration."""
    known = {}

    def get(config):
        if config == 'halves' and not HAS_HALF_CPU:
            cannot_run('current', 'this PyTorch has no bfloat16 training on a CPU')
        if config not in known:
            life = Life(server, digits, str(tmp_path_factory.mktemp('unbroken')), config)
            started = time.monotonic()
            life.finish()
            life.seconds = time.monotonic() - started
            known[config] = life
        return known[config]
    return get


@pytest.fixture
def life(server, digits, tmp_path):
    """life('plain'): a run before its first start."""
    lives = []

    def make(config, *more, **options):
        lives.append(Life(server, digits, str(tmp_path / ('life-%d' % len(lives))), config, *more, **options))
        return lives[-1]
    yield make
    for each in lives:
        for process in each.running:
            process.send(KILL, group=True)


# ---- SIGKILL at chosen points

def dies(call, path='', nth=1, when='before', do=KILL):
    return dict(call=call, path=path, nth=nth, when=when, do=int(do))


# Each start dies at the next of these faults, and the last start finishes; nth counts from the previous start.
POINTS = {
    'writing in mid-epoch': [
        ('half of a file', dies('os.fsync', r'checkpoint-0-step2', when='half')),
        ('half of another, beside the first', dies('os.fsync', r'checkpoint-0-step2', when='half')),
        ('half files are removed', dies('os.remove', r'tmp-\d+$')),
        ('half files are removed', dies('os.remove', r'tmp-\d+$', when='after')),
        ('between write and fsync', dies('os.fsync', r'checkpoint-0-step4')),
        ('between fsync and rename', dies('os.replace', r'checkpoint-0-step4')),
        ('between rename and fsync of the folder', dies('os.replace', r'checkpoint-0-step4', when='after')),
        ('after fsync of the folder', dies('os.fsync', r'/out$', when='after'))],
    'writing after an epoch': [
        ('half of log.txt', dies('os.fsync', r'log\.txt', when='half')),
        ('between fsync and rename of log.txt', dies('os.replace', r'log\.txt')),
        ('between log.txt and the checkpoints', dies('beit.files.run_folder.append_log', when='after')),
        ('half of the best', dies('os.fsync', r'checkpoint-best\.pth', when='half')),
        ('between the link and the name of the numbered one', dies('os.link', r'checkpoint-0\.pth', when='after')),
        ('between rename and fsync of the folder', dies('os.replace', r'checkpoint-1\.pth$', when='after')),
        ('between log.txt and the last checkpoints', dies('beit.files.run_folder.append_log', when='after')),
        ('when all is done', dies('run_class_finetuning.print_result'))],
    'between two best checkpoints': [
        ('', dies('beit.files.weights_file.save', r'checkpoint-best\.pth', when='after')),
        ('while that is made good', dies('os.replace', r'checkpoint-best-ema\.pth'))],
    'between the best and the first': [('', dies('beit.files.weights_file.save_copy', r'checkpoint-0\.pth'))],
    'between the best and the last': [('', dies('beit.files.weights_file.save', r'checkpoint-2\.pth'))],
    'removing old ones': [
        ('before', dies('os.remove', r'checkpoint-0-step2\.pth$')),
        ('after', dies('os.remove', r'checkpoint-0-step4\.pth$', when='after')),
        ('before that of an epoch', dies('os.remove', r'checkpoint-0\.pth$'))],
    'elsewhere': [
        ('before anything is there', dies(STEPS + 'CheckpointMonitor.begin_sync', nth=2)),
        # One checkpoint is complete at the fifth update: the second save has waited for it.
        ('in an update', dies('beit.training.loss_scaler.LossScaler._finish', nth=5, when='after')),
        ('when a checkpoint is found', dies('beit.checkpoint.training_state.resume_training')),
        ('when the folder is prepared', dies('beit.files.run_folder.prepare_folder', when='after')),
        ('in an evaluation', dies('engine_for_finetuning.evaluate', nth=2)),
        ('between two epochs', dies('beit.data.loader.EpochSampler.set_epoch', nth=2)),
        ('in the last evaluation', dies('engine_for_finetuning.evaluate', nth=4, when='after'))],
}


@pytest.mark.parametrize('points', POINTS)
def test_sigkill_at_successive_points(life, unbroken, points):
    reference, run = unbroken('plain'), life('plain')
    for name, fault in POINTS[points]:
        assert run.attempt(fault), '%s\n%s' % (name, run.story())
    run.finish().equals(reference)


def test_sigkill_in_an_update_while_a_checkpoint_is_written(life, unbroken):
    reference, run = unbroken('plain'), life('plain')
    assert run.attempt(dict(call='os.fsync', path='checkpoint-0-step2', do='sleep', seconds=60.),
                       dies(STEPS + 'CheckpointMonitor.begin_sync', nth=4))  # training does not wait for the file
    assert [name for name in os.listdir(str(run.out)) if name.startswith('checkpoint-0-step2.pth.tmp-')]
    assert reached(run.out) == (-1, 0)
    run.finish().equals(reference)


@pytest.mark.parametrize('opt', ['adahessian', 'novograd'])  # they keep state outside the usual places
def test_an_optimizer_with_hidden_state_resumes(life, opt):
    reference, run = (life('plain', '--opt=' + opt, '--epochs=2', '--lr=1e-3') for _ in range(2))
    reference.finish()
    assert run.attempt(dies(STEPS + 'CheckpointMonitor.begin_sync', nth=6))
    run.finish().equals(reference)


# ---- stop signals

NOT_BEGUN = None
ASKS = [  # where each start gets the signal, and the (epochs, updates) at which the run stops
    (dies('datasets.build_datasets'), NOT_BEGUN),
    (dies('beit.files.run_folder.prepare_folder', when='after'), NOT_BEGUN),
    (dies(STEPS + 'CheckpointMonitor.save', nth=2, when='after'), (0, 5)),
    (dies(STEPS + 'CheckpointMonitor.begin_sync'), (0, 6)),
    (dies('engine_for_finetuning.evaluate', nth=2), (0, 6)),
    (dies('beit.files.run_folder.append_log'), (1, 1)),
    (dies('beit.training.loss_scaler.LossScaler._finish', nth=2), (1, 4)),
    (dies(STEPS + 'CheckpointMonitor.after_step', nth=2), (1, 6)),  # the evaluation is interrupted
    (dies(STEPS + 'CheckpointMonitor.save_epoch', when='after'), (2, 1)),
]


@pytest.mark.parametrize('number', [TERM, INT])
def test_a_signal_stops_after_the_current_update(life, unbroken, number):
    reference, run = unbroken('plain'), life('plain')
    for fault, stop in ASKS:
        assert run.attempt(dict(fault, do=int(number)))
        assert run.running[0].status == 128 + number, run.story()
        assert ('stopped by %s after update %d of epoch %d; ' % (number.name, stop[1], stop[0] + 1) if stop else
                'interrupted by %s; with --output_dir' % number.name) in run.running[0].output(), run.story()
        assert reached(run.out) == (stop or (-1, 0)), fault
    run.finish().equals(reference)


def test_a_signal_in_the_last_save_changes_nothing(life, unbroken):
    run = life('plain')
    assert not run.attempt(dies('beit.files.weights_file.save', r'checkpoint-2\.pth', do=TERM))
    run.equals(unbroken('plain'))


def says(text):
    """A strike that waits for this text in the first process's output."""
    def wait(running):
        until = time.monotonic() + SECONDS
        while text not in running[0].output() and running[0].poll() is None and time.monotonic() < until:
            time.sleep(PAUSE)
    return wait


def exists(run, name):
    """A strike that waits for this file in output_dir; training does not wait for it."""
    def wait(running):
        until = time.monotonic() + SECONDS
        while not os.path.exists(os.path.join(run.out, name)) and running[0].poll() is None \
                and time.monotonic() < until:
            time.sleep(PAUSE)
    return wait


def test_a_second_signal_exits_immediately(life, unbroken):
    def strike(running):
        exists(run, 'checkpoint-0-step4.pth')(running)
        says('finishing this step')(running)
        running[0].send(TERM)  # the same event, sent twice
        time.sleep(1.2)
        assert running[0].poll() is None
        running[0].send(INT)
        assert running[0].wait(3) == 128 + INT

    reference, run = unbroken('plain'), life('plain')
    assert run.attempt(dies(STEPS + 'CheckpointMonitor.begin_sync', nth=5, do=TERM),
                       dict(call=STEPS + 'CheckpointMonitor.save', do='sleep', nth=3, seconds=20.), strike=strike)
    assert 'ended at once; every checkpoint that was written is whole' in run.running[0].output()
    assert reached(run.out) == (0, 4)
    run.finish().equals(reference)


# ---- workers

@pytest.mark.parametrize('number', [TERM, INT])
def test_a_signal_to_a_process_and_its_workers(life, unbroken, number):
    def strike(running):
        says('Epoch: [1]')(running)
        running[0].send(number, group=True)

    reference, run = unbroken('workers'), life('workers')
    assert run.attempt(strike=strike)
    assert run.running[0].status == 128 + number and 'stopped by' in run.running[0].output(), run.story()
    run.finish().equals(reference)


def kill_workers(running, most=1):
    for worker in running[0].session()[:most]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, KILL)


@pytest.mark.parametrize('moment', ['loading', 'an image', 'a save', 'a log line'])
def test_a_killed_worker_ends_the_run_with_one_line(life, unbroken, moment):
    reference, run = unbroken('workers'), life('workers')

    def strike(running):
        says('Epoch: [1]')(running)
        kill_workers(running)

    assert {'loading': lambda: run.attempt(strike=strike),
            'an image': lambda: run.attempt(dies('beit.data.transforms.load_image', r'train/.*/\d+\.png', nth=30)),
            'a save': lambda: run.attempt(dict(dies(STEPS + 'CheckpointMonitor.save', when='after'), do='worker'),
                                          dict(call='os.fsync', path='checkpoint-0-step5', do='sleep', seconds=1.)),
            'a log line': lambda: run.attempt(dict(dies(STEPS + 'CheckpointMonitor.after_step', nth=8), do='worker')),
            }[moment]()
    run.finish().equals(reference)


def test_the_number_of_workers_changes_no_bit(life, unbroken):
    reference = unbroken('workers')
    for workers in (0, 3):
        life('workers', '--num_workers=%d' % workers).finish().equals(reference)


# ---- at random

class Chance:
    """Draws a random fault for a start, and triggers it."""

    def __init__(self, rng, config, seconds):
        self.rng, self.config, self.seconds = rng, config, seconds
        self.processes = PROCESSES.get(config, 1)

    def attempt(self, run):
        """Returns whether the run was killed."""
        draw, rank = self.rng.random(), self.rng.randrange(self.processes)
        if draw < 0.4:
            return run.attempt(strike=self.later(run, lambda running: running[rank].send(KILL)))
        if draw < 0.6:
            number, group = self.rng.choice([TERM, TERM, INT, signal.SIGHUP]), self.rng.random() < 0.5
            return run.attempt(strike=self.later(run, lambda running: running[rank].send(number, group)))
        if draw < 0.75 and self.config == 'workers':
            most = self.rng.choice([1, 2])
            return run.attempt(strike=self.later(run, lambda running: kill_workers(running, most)))
        call, when = self.rng.choice([
            ('os.fsync', 'before'), ('os.fsync', 'after'), ('os.fsync', 'half'), ('os.replace', 'before'),
            ('os.replace', 'after'), ('os.remove', 'before'), ('os.remove', 'after'),
            ('beit.files.weights_file.save', 'before'),
            ('beit.files.weights_file.save', 'after'), ('beit.files.run_folder.append_log', 'after'),
            ('engine_for_finetuning.evaluate', 'before'), ('engine_for_finetuning.evaluate', 'after'),
            ('beit.training.loss_scaler.LossScaler._finish', 'after'),
            (STEPS + 'CheckpointMonitor.begin_sync', 'before'), (STEPS + 'CheckpointMonitor.begin_sync', 'after'),
            ('beit.data.transforms.load_image', 'before')])
        path = r'out/[^/]*$' if call in ('os.fsync', 'os.replace', 'os.remove') else ''
        path = path.replace('*', '+') if when == 'half' else path
        nth = self.rng.randint(1, 150 if call == 'beit.data.transforms.load_image' else 5)
        number = self.rng.choice([KILL, KILL, KILL, TERM])
        if when == 'half':
            number = KILL  # a run that survived would read half a file as complete, which no kill causes
        return run.attempt(dies(call, path, nth, when, number), rank=rank)

    def later(self, run, strike):
        epochs, steps = reached(run.out)
        left = 1 - (max(epochs, 0) * UPDATES + steps) / (3. * UPDATES)
        seconds = self.rng.uniform(0, self.seconds * (0.15 + 0.85 * left))

        def wait(running):
            until = time.monotonic() + seconds
            while time.monotonic() < until and all(each.poll() is None for each in running):
                time.sleep(PAUSE)
            strike(running)
        return wait


@pytest.mark.parametrize('config, in_ci, in_soak', [('plain', 8, 260), ('workers', 5, 150), ('halves', 3, 60),
                                                    ('two', 3, 110)])
def test_sigkill_at_random_points(life, unbroken, config, in_ci, in_soak):
    reference = unbroken(config)
    rng, kills = random.Random('%s %s' % (SEED, config)), 0
    chance = Chance(rng, config, reference.seconds)
    while kills < (in_soak if SOAK else in_ci):
        run = life(config)
        for _ in range(rng.randint(1, 6)):
            if not chance.attempt(run):
                break
            kills += 1
        run.finish().equals(reference)
        shutil.rmtree(run.folder)


# ---- damage

DAMAGES = {
    'a bit flipped': lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1:],
    'cut off': lambda data: data[:len(data) * 2 // 3],
    'empty': lambda data: b'',
    'zeros': lambda data: bytes(len(data)),
}


def damage(path, how):
    data = DAMAGES[how](read_bytes(path))
    with open(path, 'wb') as file:
        file.write(data)


@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped(life, unbroken, how):
    reference, run = unbroken('plain'), life('plain')
    assert run.attempt(dies('os.replace', r'checkpoint-1-step4\.pth$', when='after'))
    assert reached(run.out) == (1, 4)
    damage(os.path.join(run.out, 'checkpoint-1-step4.pth'), how)
    run.finish()
    assert re.search(r'checkpoint-1-step4\.pth: .*; skipped', run.running[0].output()), run.story()
    assert resumed(run.running[0].output()) == (1, 2)
    run.equals(reference)


@pytest.mark.parametrize('config, taken', [('workers', 'checkpoint-2.pth'), ('plain', 'checkpoint-2.pth')])
def test_a_damaged_best_checkpoint_is_not_evaluated(server, unbroken, tmp_path, config, taken):
    reference, out = unbroken(config), str(tmp_path / 'out')
    shutil.copytree(reference.out, out)
    damage(os.path.join(out, 'checkpoint-best.pth'), 'a bit flipped')
    process = Process(server, str(tmp_path / 'log'), [
        flag for flag in reference.flags if not flag.startswith(('--output_dir', '--auto_resume'))]
        + ['--eval', '--resume=' + out])
    assert process.wait() == 0, process.output()
    assert re.search(r'checkpoint-best\.pth: .*; skipped\n', process.output()), process.output()
    assert 'Evaluating %s\n' % os.path.join(out, taken) in process.output(), process.output()


# ---- several processes

def test_a_signal_to_the_second_process(life, unbroken):
    reference, run = unbroken('two'), life('two')
    assert run.attempt(dies(STEPS + 'CheckpointMonitor.begin_sync', nth=9, do=TERM), rank=1)
    assert reached(run.out) == (1, 3)
    assert 'stopped by SIGTERM' in run.running[0].output()
    run.finish().equals(reference)


def test_sigkill_of_the_second_process(life, unbroken):
    """It is in its ninth update, and the first process has written the checkpoint after the eighth."""
    def strike(running):
        exists(run, 'checkpoint-1-step2.pth')(running)
        running[1].send(KILL)

    reference, run = unbroken('two'), life('two')
    assert run.attempt(dict(call=STEPS + 'CheckpointMonitor.begin_sync', do='sleep', nth=9, seconds=float(SECONDS)),
                       strike=strike, rank=1)
    assert reached(run.out) == (1, 2)
    run.finish().equals(reference)


def images(folder, processes):
    """The recorded images of each micro-step over all processes."""
    notes = [[json.loads(line) for line in read_bytes(folder, 'notes' + (str(rank) if processes > 1 else '')
                                                      ).splitlines()] for rank in range(processes)]
    return [sorted(sum(step, [])) for step in zip(*notes)]


def test_one_process_resumes_a_run_of_two(life, digits):
    """With the same total batch, the images and their order are equal; a line names the differences."""
    def noting(run):
        return dict(call=STEPS + 'StepState.add', path=os.path.join(run.folder, 'notes'), do='note')

    whole, run = life('two'), life('two')
    whole.start(noting(whole), rank=None)
    assert whole.wait() == [0, 0]
    assert run.attempt(dies(STEPS + 'CheckpointMonitor.begin_sync', nth=9, do=TERM))
    run.processes, run.flags = 1, run.flags + ['--batch_size=8']
    run.start(noting(run))
    assert run.wait() == [0], run.story()
    assert resumed(run.running[0].output()) == (1, 3)
    assert re.search(r'in the same order of the data, but not .*: --batch_size: 8 \(was 4\); processes: 1 \(was 2\)\n',
                     run.running[0].output()), run.story()
    assert images(run.folder, 1) == images(whole.folder, 2)[2 * 9:]
    assert [json.loads(line)['epoch'] for line in read_bytes(run.out, 'log.txt').splitlines()] == [0, 1, 2]


class Launched:
    """A launcher as users start it, with processes that import everything themselves."""

    def __init__(self, run, *command):
        self.out = run.out
        env = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
        self.log = open(os.path.join(run.folder, 'log-0'), 'ab')
        self.begin = self.log.tell()
        self.process = subprocess.Popen([sys.executable] + list(command), stdout=self.log, stderr=subprocess.STDOUT,
                                        env=dict(env, OMP_NUM_THREADS='1', PYTHONPATH=ROOT), stdin=subprocess.DEVNULL,
                                        preexec_fn=process_group.end_with_parent)

    def child(self, rank):
        """The process id of a rank."""
        for name in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError):
                parent = int(read_bytes('/proc', name, 'stat').rpartition(b')')[2].split()[1])
                variables = read_bytes('/proc', name, 'environ').split(b'\0')
                if parent == self.process.pid and b'RANK=%d' % rank in variables:
                    return int(name)
        raise AssertionError('there is no process of rank %d' % rank)

    def until(self, name):
        """Wait for a file in output_dir."""
        until = time.monotonic() + SECONDS
        while not os.path.exists(os.path.join(self.out, name)):
            assert self.process.poll() is None and time.monotonic() < until, self.output()
            time.sleep(PAUSE)

    def end(self):
        self.process.wait(SECONDS)
        self.log.close()
        return self.process.returncode

    def output(self):
        return read_bytes(self.log.name)[self.begin:].decode()


def test_faults_under_the_launcher(life, unbroken):
    """Rank 1 of 2 is killed; in the next start it gets a stop signal."""
    reference, run = unbroken('two'), life('two')
    command = LAUNCHER + ['--nproc_per_node=2', PROGRAM] + run.flags

    launched = Launched(run, *command)
    launched.until('checkpoint-0-step2.pth')
    os.kill(launched.child(1), KILL)
    TALLY.kills += 1
    assert launched.end() == 128 + KILL, launched.output()
    assert 'process 1 ended with SIGKILL; the others were stopped\n' in launched.output()
    assert (0, 2) <= reached(run.out) < (2, 6)

    before, launched = reached(run.out), Launched(run, *command)
    while launched.process.poll() is None and 'Epoch: ' not in launched.output():
        time.sleep(PAUSE)
    os.kill(launched.child(1), TERM)
    TALLY.kills += 1
    assert launched.end() == 128 + TERM, launched.output()
    assert resumed(launched.output()) == before
    TALLY.resumes += 1
    found = re.search(r'stopped by SIGTERM after update (\d+) of epoch (\d+); saved (\S+); the same command continues',
                      launched.output())
    assert (int(found.group(2)) - 1, int(found.group(1))) == reached(run.out) > before, launched.output()

    run.only_killed = False
    run.finish().equals(reference)


@pytest.mark.needs('current', importlib.util.find_spec('torch.distributed.run') is not None,
                   'this PyTorch has no torchrun')
def test_torchrun_restarts_the_run(life, unbroken):
    """Rank 1 is killed in its ninth update; torchrun alone restarts the job."""
    reference, run = unbroken('two'), life('two')
    launched = Launched(
        run, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=3',
        '--monitor_interval=0.2', os.path.abspath(__file__), '1',
        json.dumps(dies(STEPS + 'CheckpointMonitor.begin_sync', nth=9)),
        *[flag for flag in run.flags if flag != '--auto_resume'])
    assert launched.end() == 0, launched.output()
    TALLY.kills += 1
    TALLY.resumes += 1
    assert resumed(launched.output()) == (1, 2), launched.output()
    assert launched.output().count('Resumed ') == 1 and 'exactly as if' in launched.output()
    run.flags = reference.flags
    run.equals(reference)


@pytest.mark.parametrize('restarted', ['by SLURM', 'by hand'])
@pytest.mark.parametrize('inside', [False, True])
def test_a_job_that_resumes_a_file_finishes(life, unbroken, inside, restarted):
    """Each start is stopped in its fifth of the remaining 12 updates; the line after the signal gives the command.

    A resumed file in output_dir is removed during the run, like other old checkpoints.
    """
    reference, origin, run = unbroken('plain'), life('plain', '--maxstep=6'), life('plain')
    origin.finish()
    file = os.path.join(origin.out, 'checkpoint-0.pth')
    if inside:
        shutil.copytree(origin.out, run.out)
        file = os.path.join(run.out, 'checkpoint-0.pth')
    command = [flag for flag in run.flags if flag != '--auto_resume'] + ['--resume=' + file]
    seen = []
    for start in range(5):
        env, more = ({'SLURM_RESTART_COUNT': str(start)}, []) if restarted == 'by SLURM' else (
            {}, ['--auto_resume'] * (start > 0))
        process = Process(run.server, os.path.join(run.folder, 'log-0'), command + more,
                          [dies(STEPS + 'CheckpointMonitor.begin_sync', nth=5, do=TERM)], **env)
        run.running = [process]
        seen.append((process.wait(), resumed(process.output())))
        if process.status == 0:
            break
        TALLY.kills += 1
        says = 'the same command%s continues' % ('' if env and start or more else ' with --auto_resume')
        assert process.status == 128 + TERM and says in process.output(), run.story()
    TALLY.resumes += len(seen)
    assert seen == [(128 + TERM, (1, 0)), (128 + TERM, (1, 5)), (0, (2, 4))], run.story()
    assert os.path.exists(file) != inside
    for name in ('checkpoint-1.pth', 'checkpoint-2.pth'):
        mine, theirs = (dict(content_of(os.path.join(each.out, name)), args=None) for each in (run, reference))
        assert mine['progress'] == dict(theirs['progress'], origin=file)
        assert not difference(dict(mine, progress=None), dict(theirs, progress=None))


def run_under_torchrun(rank, fault, *flags):
    if os.environ['RANK'] == rank and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        plant(**json.loads(fault))
    return run_class_finetuning.run(list(flags))


def test_a_worker_killed_after_the_last_save_is_not_reported():
    with preemption.Signals() as signals:
        with signals.deferred():
            batches = iter(torch.utils.data.DataLoader(list(range(64)), num_workers=2, batch_size=2))
            next(batches)
            before = signal.getsignal(signal.SIGCHLD)
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        time.sleep(0.5)  # PyTorch's handler would raise in this function
        batches._shutdown_workers()
    assert signal.getsignal(signal.SIGCHLD) is before and callable(before)


# ---- summary

def test_number_of_kills_and_losses(request, capsys):
    """Shows the counts in `pytest -q`; too few kills are a failure if every test of this file ran."""
    with capsys.disabled():
        print('\nfaults: %d kills, %d resumes, %d losses%s' % (TALLY.kills, TALLY.resumes, TALLY.losses,
                                                               ', seed %d' % SEED if SOAK else ''))
    assert TALLY.losses == 0
    chosen = {item.function for item in request.session.items if item.fspath == request.node.fspath}
    if {value for name, value in globals().items() if name.startswith('test_')} <= chosen:
        assert TALLY.kills >= (KILLS_IN_SOAK if SOAK else KILLS_IN_CI)


if __name__ == '__main__':
    sys.exit(run_under_torchrun(*sys.argv[1:]) if sys.argv[1:] else serve())
