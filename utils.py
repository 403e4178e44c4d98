"""Small tools of a run: meters and log lines, TensorBoard, the average of the weights, seeding, folders."""

import contextlib
import copy
import datetime
import json
import math
import os
import random
import re
import tempfile
import threading
import time
from collections import defaultdict, deque

import numpy as np
import torch

import backend
import distributed
import progress
import watchdog
from errors import UserError, escape_text
from safe_files import write_bytes


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


def read_numbers(values):
    """Floats of numbers and 0-dim tensors, all that lie on a device in one copy."""
    tensors = [value.detach().float() for value in values if torch.is_tensor(value)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if torch.is_tensor(value) else float(value) for value in values]


class MetricLogger:
    """Named meters, and an iterator that prints them each few steps.

    What it is given may lie on a device: it is read when the meters are looked at, not before.
    """

    def __init__(self, delimiter='  '):
        self.meters = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.unread = []  # (name, number or 0-dim tensor, how many it is the mean of), in order

    def add_meter(self, name, meter):
        self.meters[name] = meter

    def update(self, n=1, **values):
        """Take note of numbers or 0-dim tensors, means of `n`; None is none, and what is not finite is left out."""
        self.unread += [(name, value, n) for name, value in values.items() if value is not None]

    def read(self):
        """Bring the meters up to date."""
        unread, self.unread = self.unread, []
        for (name, _, n), value in zip(unread, read_numbers([value for _, value, _ in unread])):
            if math.isfinite(value):
                self.meters[name].update(value, n)

    def synchronize_between_processes(self, device):
        self.read()
        for name in sorted(self.meters):
            self.meters[name].synchronize_between_processes(device)

    def averages(self):
        self.read()
        return {name: meter.global_avg for name, meter in self.meters.items() if meter.count}

    def state(self):
        """The totals, as plain values."""
        self.read()
        return {name: [meter.count, meter.total] for name, meter in self.meters.items()}

    def load_state(self, state):
        for name, (count, total) in state.items():
            self.meters[name].count, self.meters[name].total = int(count), float(total)

    def log_every(self, iterable, steps, print_freq, header, device, processes=1, throughput=None, hidden=(), start=0):
        """Yield from `iterable`, of `steps` items those from `start` on; print a line each `print_freq`, and the last.

        A device works on while the loop goes ahead. It is waited for at each line and in the first steps, and the time
        between is shared out evenly. Waiting for data is what the device does, not what the loop does.

        Args:
            iterable: gives (images, targets, …); the number of images goes into the fps of the line.
            processes (int): how many of them take such a step together.
            throughput (Throughput): takes the time of each step, and the share of it that the loader was waited for.
            hidden (tuple of str): meters that stay out of the line.
        """
        step_seconds, data_seconds = SmoothedValue(fmt='{value:.4f}'), SmoothedValue(fmt='{value:.4f}')
        throughput = throughput or Throughput()
        counter = '{:%dd}' % len(str(steps))
        stage = ' (%s step %%d)' % header.replace('%', '%%')
        screen = distributed.screen
        if screen is not None:
            screen.begin(header, steps, start)
        watchdog.enter(header)
        watchdog.mark(start, 0, stage)
        waiting = []  # (images, marks before and after waiting for data) of the steps since the device was waited for
        since, before = time.time(), backend.mark(device)
        for step, item in enumerate(iterable, start):
            watchdog.mark(step, 1, stage)
            waiting.append((len(item[0]) * processes, before, backend.mark(device)))
            yield item
            is_printed = is_line(step, steps, print_freq)
            if is_printed or backend.reads_freely(device) or len(throughput.steps) < throughput.warmup_steps:
                backend.synchronize(device)
                now = time.time()
                for images, before, after in waiting:
                    step_seconds.update((now - since) / len(waiting))
                    data_seconds.update(backend.seconds_between(before, after))
                    throughput.update(images, step_seconds.value, data_seconds.value)
                since, waiting = now, []
            is_shown = screen is not None and (is_printed or backend.reads_freely(device))
            if is_printed or is_shown:
                self.read()
                images_per_second = len(item[0]) * processes / max(step_seconds.median, 1e-9)
            if is_printed:
                eta = datetime.timedelta(seconds=int(step_seconds.global_avg * (steps - step - 1)))
                distributed.say(self.delimiter.join(
                    ['%s  [%s/%d]' % (header, counter.format(step), steps), 'eta: %s' % eta]
                    + ['%s: %s' % (name, meter) for name, meter in self.meters.items()
                       if name not in hidden and meter.window]
                    + ['time: %s' % step_seconds, 'data: %s' % data_seconds,
                       'max mem: %.0f' % backend.max_memory_mb(device),
                       'fps: %.0f' % images_per_second]), detail=True)
            if screen is not None:
                screen.step(progress.figures(self.meters, images_per_second) if is_shown else None)
            watchdog.mark(step + 1, 0, stage)
            before = backend.mark(device)
        if screen is not None:
            screen.end()
        watchdog.mark(watchdog.LAST, 2, stage)


def is_line(step, steps, print_freq=10):
    """Whether a line is printed after this step: each `print_freq`, and the last."""
    return step % print_freq == 0 or step == steps - 1


class Throughput:
    """Images per second over a run, without its first steps, in which kernels are compiled and caches filled."""

    def __init__(self, warmup_steps=5):
        self.warmup_steps = warmup_steps
        self.steps = []  # (images, seconds, those of them that the loader was waited for)

    def update(self, images, seconds, data_seconds=0.):
        self.steps.append((images, seconds, data_seconds))

    def _counted(self):
        """(images, seconds, seconds of waiting for data, steps), in all."""
        counted, every = self.steps[min(self.warmup_steps, len(self.steps) // 2):], sum(step[0] for step in self.steps)
        if 2 * sum(step[0] for step in counted) < every:
            counted = self.steps  # what is left over of few batches says little
        return tuple(sum(column) for column in zip(*counted)) + (len(counted),) if counted else (0, 0., 0., 0)

    @property
    def images_per_second(self):
        images, seconds, _, _ = self._counted()
        return images / max(seconds, 1e-9)

    @property
    def step_milliseconds(self):
        _, seconds, _, steps = self._counted()
        return 1000 * seconds / max(steps, 1)

    @property
    def data_share(self):
        """The share of the time that was spent waiting for data."""
        _, seconds, data_seconds, _ = self._counted()
        return data_seconds / max(seconds, 1e-9)

    def limit(self):
        """Which of the two is the limit, for people."""
        share = self.data_share
        return 'the %s is the limit; %.1f %% of the time the device waited for data%s' % (
            'device' if share < 0.5 else 'loader', 100 * share,
            '' if share < 0.05 else ', %s--num_workers and --data_backend may help' % ('where ' if share < 0.5 else ''))


class TensorboardLogger:
    """Scalars to TensorBoard, through tensorboardX. The step is the caller's, in updates or epochs.

    tensorboardX writes in a thread, and waits for ever where that thread has met a full disk. So it's watched.

    Raises:
        UserError: the folder can't be written.
    """

    def __init__(self, log_dir):
        try:
            from tensorboardX import SummaryWriter  # needed only by those who ask for it
        except ImportError as error:
            raise UserError('--log_dir %s: tensorboardX cannot be imported (%s); run: pip install tensorboardX'
                            % (escape_text(log_dir), error)) from None
        self.log_dir, self.failure = log_dir, None
        self.hook, threading.excepthook = threading.excepthook, self.note
        try:
            self.writer = SummaryWriter(logdir=log_dir)
        except OSError as error:
            self.failure = error
            self.check()

    def note(self, failed):
        """What a thread raised."""
        if isinstance(failed.exc_value, OSError):
            self.failure = failed.exc_value
        else:
            self.hook(failed)

    def check(self):
        if self.failure is not None:
            file_writer = getattr(getattr(self, 'writer', None), 'file_writer', None)
            if hasattr(file_writer, 'event_writer'):
                file_writer.event_writer.close = lambda: None  # it would be tried again, and fail, at Python's exit
            raise UserError('--log_dir %s: cannot write there (%s); make room, or choose another'
                            % (escape_text(self.log_dir), self.failure.strerror or self.failure))

    def update(self, head, step, **values):
        for name, value in values.items():
            self.check()
            if value is not None:
                self.writer.add_scalar('%s/%s' % (head, name), float(value), step)

    def image(self, tag, step, pixels):
        """A picture, uint8 (H, W, 3)."""
        self.check()
        self.writer.add_image(tag, pixels, step, dataformats='HWC')

    def close(self):
        """Write what is still queued."""
        closing = threading.Thread(target=self.writer.close, daemon=True)
        closing.start()
        while closing.is_alive():
            closing.join(0.05)
            self.check()
        threading.excepthook = self.hook


def append_log(output_dir, stats):
    """Add one JSON line to output_dir/log.txt, which is rewritten whole: a kill leaves no half line.

    Lines of the same or a later epoch give way: they are of a run that went on from before them. So do half lines.
    """
    path, kept = os.path.join(output_dir, 'log.txt'), []
    if os.path.isfile(path):
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            kept = [line for line in file if line.endswith('\n') and not _is_of(line, stats['epoch'])]
    text = ''.join(kept) + json.dumps(stats) + '\n'
    write_bytes(path, text.encode('utf-8', 'surrogateescape'))


def _is_of(line, epoch):
    """Whether a line of log.txt is of this epoch or a later one."""
    try:
        stats = json.loads(line)
        return isinstance(stats, dict) and isinstance(stats.get('epoch'), int) and stats['epoch'] >= epoch
    except ValueError:
        return False


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
    def update(self, state, skip=False):
        """Move towards `state`, a name-to-float32-tensor dict of the model's weights and buffers, unless `skip`.

        Args:
            skip (bool or 0-dim bool tensor): whether the update was skipped, as `precision.StepScaler` tells.
        """
        averages = self.ema.state_dict()
        floats = [name for name, average in averages.items() if average.is_floating_point()]
        values = [state[name].to(averages[name].device) for name in floats]
        backend.average_all([averages[name] for name in floats], values, self.decay, skip)
        for name in set(averages) - set(floats):
            averages[name].copy_(state[name])


# ---- random numbers

def seed_everything(seed):
    """Seed Python's, NumPy's and PyTorch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    backend.seed_device(seed)


def seed_step(seed, update_step):
    """Seed every generator for one update of this process, so that a run can go on after any of them.

    What an evaluation or a loader drew in between makes no difference then, and there is no state to save.
    """
    words = np.random.SeedSequence([seed, distributed.rank(), update_step]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])
    backend.seed_device(words[2])


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
    try:
        with tempfile.TemporaryFile(prefix='.write-test-', dir=existing):  # nameless where the system can do so
            pass
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
        for path in half_files(folder):
            with contextlib.suppress(OSError):
                os.remove(path)
        try:
            if files:
                aside = name_aside(folder, files)
                os.mkdir(aside)
                for path in files:
                    os.rename(path, os.path.join(aside, os.path.basename(path)))
                distributed.say('Moved the earlier run in %s aside, to %s (--auto_resume would have gone on with it)'
                                % (escape_text(folder), escape_text(aside)))
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError('--output_dir %s holds an earlier run and it cannot be moved aside (%s); choose another, '
                            'or go on with --auto_resume' % (folder, error)) from None
    distributed.barrier()


def half_files(folder):
    """Paths of what a killed process was about to write there; nothing ever reads them."""
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in os.listdir(folder)
            if re.match(r'(checkpoint-.*\.pth|(log|bad_images|nonfinite)\.txt|(eval-)?args\.yaml|'
                     r'(eval-)?summary\.json|curves\.png|report\.html|\.beit-index-\w+)\.tmp-\d+$', name)]


def files_of_a_run(folder):
    """Paths of the checkpoints, log.txt and what else a run left in a folder; [] where none did."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if re.match(r'checkpoint-.*\.pth$', name)]
    log = os.path.join(folder, 'log.txt')
    if os.path.isfile(log):
        with open(log, encoding='utf-8', errors='replace') as file:
            if file.read(9) == '{"train_l':  # as append_log begins; anybody may have a log.txt
                names.append('log.txt')
    if names:
        names += [name for name in ('prof', 'bad_images.txt', 'nonfinite.txt', 'args.yaml', 'summary.json',
                                    'curves.png', 'report.html', 'eval-args.yaml', 'eval-summary.json',
                                    'eval-report.html')
                  if os.path.lexists(os.path.join(folder, name))]
    return [os.path.join(folder, name) for name in names]


def name_aside(folder, files):
    """<folder>-<date and time of the newest file>, with a number where that name is taken; beside a link's target."""
    newest = time.localtime(max(os.lstat(path).st_mtime for path in files))
    base = '%s-%s' % (os.path.realpath(folder), time.strftime('%Y%m%d-%H%M%S', newest))
    names = [base] + ['%s-%d' % (base, number) for number in range(2, 1000)]
    return next(name for name in names if not os.path.lexists(name))
