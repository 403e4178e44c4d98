"""Small tools of a run: meters and log lines, TensorBoard, the average of the weights, seeding, folders."""

import copy
import datetime
import json
import os
import random
import re
import time
from collections import defaultdict, deque

import numpy as np
import torch

import backend
import distributed
from errors import UserError


# ---- meters and log lines

class SmoothedValue:
    """A series of numbers: the newest `window_size` smoothed, and the average of all."""

    def __init__(self, window_size=20, fmt='{median:.4f} ({global_avg:.4f})'):
        self.window = deque(maxlen=window_size)
        self.total, self.count, self.fmt = 0., 0, fmt

    def update(self, value, n=1):
        self.window.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self, device):
        """Make total and count those of all processes; in float32, which every backend can reduce."""
        count, total = distributed.sum_over_processes((self.count,), self.total, device)
        self.count, self.total = count, total

    @property
    def median(self):
        return sorted(self.window)[(len(self.window) - 1) // 2]

    @property
    def global_avg(self):
        return self.total / max(self.count, 1)

    @property
    def value(self):
        return self.window[-1]

    def __str__(self):
        if not self.window:
            return '-'
        return self.fmt.format(median=self.median, global_avg=self.global_avg, value=self.value)


class MetricLogger:
    """Named meters, and an iterator that prints them each few steps."""

    def __init__(self, delimiter='  '):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def update(self, **values):
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(float(value))

    def synchronize_between_processes(self, device):
        for name in sorted(self.meters):
            self.meters[name].synchronize_between_processes(device)

    def averages(self):
        return {name: meter.global_avg for name, meter in self.meters.items() if meter.count}

    def log_every(self, iterable, steps, print_freq, header, device, processes=1, throughput=None, hidden=()):
        """Yield from `iterable`, `steps` items long; print a line each `print_freq` steps and at the last.

        Args:
            iterable: gives (images, targets); the number of images goes into the fps of the line.
            processes (int): how many of them take such a step together.
            throughput (Throughput): takes the time of each step.
            hidden (tuple of str): meters that stay out of the line.
        """
        step_seconds, data_seconds = SmoothedValue(fmt='{value:.4f}'), SmoothedValue(fmt='{value:.4f}')
        counter = '{:%dd}' % len(str(steps))
        end = time.time()
        for step, item in enumerate(iterable):
            data_seconds.update(time.time() - end)
            images = len(item[0]) * processes
            yield item
            step_seconds.update(time.time() - end)
            if throughput is not None:
                throughput.update(images, step_seconds.value)
            if step % print_freq == 0 or step == steps - 1:
                eta = datetime.timedelta(seconds=int(step_seconds.global_avg * (steps - step - 1)))
                distributed.say(self.delimiter.join(
                    ['%s  [%s/%d]' % (header, counter.format(step), steps), 'eta: %s' % eta]
                    + ['%s: %s' % (name, meter) for name, meter in self.meters.items()
                       if name not in hidden and meter.window]
                    + ['time: %s' % step_seconds, 'data: %s' % data_seconds,
                       'max mem: %.0f' % backend.max_memory_mb(device),
                       'fps: %.0f' % (images / max(step_seconds.median, 1e-9))]))
            end = time.time()


class Throughput:
    """Images per second over a run, without its first steps, in which kernels are compiled and caches filled."""

    def __init__(self, warmup_steps=5):
        self.warmup_steps = warmup_steps
        self.steps = []  # (images, seconds)

    def update(self, images, seconds):
        self.steps.append((images, seconds))

    def _counted(self):
        return self.steps[min(self.warmup_steps, len(self.steps) // 2):]

    @property
    def images_per_second(self):
        return sum(images for images, _ in self._counted()) / max(sum(seconds for _, seconds in self._counted()), 1e-9)

    @property
    def step_milliseconds(self):
        return 1000 * sum(seconds for _, seconds in self._counted()) / max(len(self._counted()), 1)


class TensorboardLogger:
    """Scalars to TensorBoard, through tensorboardX. The step is the caller's, in updates or epochs."""

    def __init__(self, log_dir):
        from tensorboardX import SummaryWriter  # needed only by those who ask for it
        self.writer = SummaryWriter(logdir=log_dir)

    def update(self, head, step, **values):
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar('%s/%s' % (head, name), float(value), step)

    def close(self):
        """Write what is still queued."""
        self.writer.close()


def append_log(output_dir, stats):
    """Add one JSON line to output_dir/log.txt."""
    with open(os.path.join(output_dir, 'log.txt'), 'a', encoding='utf-8') as file:
        file.write(json.dumps(stats) + '\n')


# ---- the average of the weights

class ModelEma:
    """Exponential moving average of a model's weights, in float32: ema = decay * ema + (1 - decay) * weights.

    Integer buffers are copied: averaging them as timm 1.0 does turns the relative position index 5 into 4, since
    5 * 0.9999 + 5 * 0.0001 falls below 5 and is cut off.

    Attributes:
        ema (Module): the averaged model, for evaluation.
    """

    def __init__(self, model, decay=0.9999, device=None):
        self.ema = copy.deepcopy(model).eval()
        self.decay = decay
        if device is not None:
            self.ema.to(device)
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, state):
        """Move towards `state`, a name-to-float32-tensor dict of the model's weights and buffers."""
        for name, average in self.ema.state_dict().items():
            value = state[name].to(average.device)
            if average.is_floating_point():
                average.mul_(self.decay).add_(value, alpha=1 - self.decay)
            else:
                average.copy_(value)


# ---- random numbers

def seed_everything(seed):
    """Seed Python's, NumPy's and PyTorch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    backend.seed_device(seed)


def random_state(device):
    """The generators' states as plain values and tensors, which a safe reader takes."""
    version, key, position = random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]
    name, words, index, has_gauss, gauss = np.random.get_state()
    return {'python': [version, key, position], 'torch': torch.get_rng_state(),
            'device': backend.device_rng_state(device),
            'numpy': [name, torch.from_numpy(words.astype(np.int64)), int(index), int(has_gauss), float(gauss)]}


def set_random_state(state, device):
    if not isinstance(state, dict):
        return
    version, key, position = state['python']
    random.setstate((version, tuple(key), position))
    name, words, index, has_gauss, gauss = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), index, has_gauss, gauss))
    torch.set_rng_state(state['torch'])
    backend.set_device_rng_state(device, state.get('device'))


# ---- folders

def check_writable(flag, folder):
    """Raise a `UserError` where a folder can't be made or written to. Leaves no new folder behind."""
    if not folder:
        return
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UserError('%s %s: %s is a file, not a folder; choose another' % (flag, folder, existing))
    probe = os.path.join(existing, '.write-test-%d' % os.getpid())
    try:
        with open(probe, 'w', encoding='utf-8'):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError('%s %s: %s cannot be written to (%s); choose another'
                        % (flag, folder, existing, error.strerror or error)) from None


def prepare_folder(folder, keep=False):
    """Make the output folder, by the first process. What an earlier run left there is moved aside, not overwritten.

    Only a run's own files are moved, into <folder>-<date of the newest>; whatever else lies there stays.

    Args:
        keep (bool): this run goes on with what is there.

    Raises:
        UserError: they can't be moved.
    """
    if folder and distributed.is_main_process():
        files = [] if keep else files_of_a_run(folder)
        try:
            if files:
                aside = name_aside(folder, files)
                os.mkdir(aside)
                for path in files:
                    os.rename(path, os.path.join(aside, os.path.basename(path)))
                distributed.say('Moved the earlier run in %s aside, to %s' % (folder, aside))
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError('--output_dir %s holds an earlier run and it cannot be moved aside (%s); choose another, '
                            'or go on with --auto_resume' % (folder, error)) from None
    distributed.barrier()


def files_of_a_run(folder):
    """Paths of the checkpoints, log.txt and profile that a run left in a folder; [] where none did."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.match(r'checkpoint-.*\.pth(\.tmp-\d+)?$', name)]
    log = os.path.join(folder, 'log.txt')
    if os.path.isfile(log):
        with open(log, encoding='utf-8', errors='replace') as file:
            if file.read(9) == '{"train_l':  # as append_log begins; anybody may have a log.txt
                names.append('log.txt')
    if names and os.path.isdir(os.path.join(folder, 'prof')):
        names.append('prof')
    return [os.path.join(folder, name) for name in names]


def name_aside(folder, files):
    """<folder>-<date and time of the newest file>, with a number where that name is taken; beside a link's target."""
    newest = time.localtime(max(os.lstat(path).st_mtime for path in files))
    base = '%s-%s' % (os.path.realpath(folder), time.strftime('%Y%m%d-%H%M%S', newest))
    names = [base] + ['%s-%d' % (base, number) for number in range(2, 1000)]
    return next(name for name in names if not os.path.lexists(name))
