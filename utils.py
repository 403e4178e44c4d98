"""Meters and log lines, TensorBoard, the moving average of the weights, seeding."""

import contextlib
import copy
import datetime
import math
import os
import random
import time
from collections import defaultdict, deque
from typing import Any, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from beit import startup
from beit.devices import accelerator, kernels
from beit.distributed import collectives, process_group, watchdog
from beit.errors import UserError, escape_text
from beit.log import current_display, format_metrics, log_main

# ---- meters and log lines

class SmoothedValue:
    """A series of numbers: the median of the newest `window_size`, and the average of all."""

    def __init__(self, window_size: int = 20, fmt: str = '{median:.4f} ({global_avg:.4f})') -> None:
        self.window: Deque[float] = deque(maxlen=window_size)
        self.total, self.count, self.fmt = 0., 0, fmt

    def update(self, value: float, n: int = 1) -> None:
        self.window.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self, device: torch.device) -> None:
        """Add up total and count over all processes, in float32, which every backend can reduce."""
        self.count, self.total = collectives.all_reduce_sum((self.count,), self.total, device)

    @property
    def median(self) -> float:
        return sorted(self.window)[(len(self.window) - 1) // 2]

    @property
    def global_avg(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def value(self) -> float:
        return self.window[-1]

    def __str__(self) -> str:
        return self.fmt.format(median=self.median, global_avg=self.global_avg, value=self.value)


def to_floats(values: Iterable) -> List[float]:
    """Convert numbers and 0-dim tensors to floats, with one copy from the device."""
    tensors = [value.detach().float() for value in values if torch.is_tensor(value)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if torch.is_tensor(value) else float(value) for value in values]


class MetricLogger:
    """Named meters, and an iterator that prints them every few steps.

    Values may be on a device; they are copied when the meters are read.
    """

    def __init__(self) -> None:
        self.meters: Dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.unread: List[Tuple[str, Any, int]] = []  # (name, number or 0-dim tensor, the count that it averages)

    def update(self, n: int = 1, **values: Any) -> None:
        """Record numbers or 0-dim tensors, means over `n`; None and non-finite values are ignored."""
        self.unread += [(name, value, n) for name, value in values.items() if value is not None]

    def read(self) -> Dict[str, SmoothedValue]:
        """Copy recorded values into the meters; returns these."""
        unread, self.unread = self.unread, []
        for (name, _, n), value in zip(unread, to_floats([value for _, value, _ in unread])):
            if math.isfinite(value):
                self.meters[name].update(value, n)
        return self.meters

    def synchronize_between_processes(self, device: torch.device) -> None:
        for _, meter in sorted(self.read().items()):
            meter.synchronize_between_processes(device)

    def averages(self) -> Dict[str, float]:
        return {name: meter.global_avg for name, meter in self.read().items() if meter.count}

    def state(self) -> Dict[str, Any]:
        """The totals as plain values."""
        return {name: [meter.count, meter.total] for name, meter in self.read().items()}

    def load_state(self, state: Dict[str, Any]) -> None:
        for name, (count, total) in state.items():
            self.meters[name].count, self.meters[name].total = int(count), float(total)

    def log_every(self, iterable: Iterable, steps: int, header: str, timer: 'StepTimer', start: int = 0) -> Iterator:
        """Yield the items of `iterable`, (images, targets, …) from step `start` on; print the lines of the steps."""
        display = current_display()
        display.begin(header, steps, start)
        for step, item in enumerate(watchdog.track(timer.time_data(iterable), header, start), start):
            yield item
            is_line = should_log(step, steps)
            is_timed = timer.end_step(is_line)
            if is_line:
                log_main(self.line(header, step, steps, timer), detail=True)
            display.step((lambda: format_metrics(self.read(), timer.images_per_second)) if is_timed else None)
        display.end()

    def line(self, header: str, step: int, steps: int, timer: 'StepTimer') -> str:
        """The line after a step: progress, meters, times, memory, images per second."""
        eta = datetime.timedelta(seconds=int(timer.step_seconds.global_avg * (steps - step - 1)))
        return '  '.join([
            '%s  [%*d/%d]' % (header, len(str(steps)), step, steps), 'eta: %s' % eta,
            *('%s: %s' % (name, meter) for name, meter in self.read().items()
              if name != 'loss_scale' and meter.window),
            'time: %s' % timer.step_seconds, 'data: %s' % timer.data_seconds,
            'max mem: %.0f' % accelerator.max_memory_mb(timer.device), 'fps: %.0f' % timer.images_per_second])


class StepTimer:
    """Times the steps of a loop, and how long each step waited for the loader.

    The device computes asynchronously. The timer synchronizes with it at each line and in the first steps, and divides
    the time in between evenly among the steps. It measures how long the device waits for data, not the loop.
    `throughput` collects the times of each step, which all `processes` take together.
    """

    def __init__(self, device: torch.device, processes: int = 1, throughput: Optional['Throughput'] = None) -> None:
        self.device, self.processes = device, processes
        self.throughput = Throughput() if throughput is None else throughput
        self.step_seconds, self.data_seconds = SmoothedValue(fmt='{value:.4f}'), SmoothedValue(fmt='{value:.4f}')
        self.images, self.since = 0, 0.
        # (images, events before and after waiting for data) of the steps since the last synchronization
        self.untimed: List[Tuple[int, Any, Any]] = []

    def time_data(self, iterable: Iterable) -> Iterator:
        """Yield from `iterable`, (images, …), and record an event before and after each item is fetched."""
        self.since, before = time.time(), accelerator.record_event(self.device)
        for item in iterable:
            self.images = len(item[0]) * self.processes
            self.untimed.append((self.images, before, accelerator.record_event(self.device)))
            yield item
            before = accelerator.record_event(self.device)

    def end_step(self, is_line: bool) -> bool:
        """Call after each step. Returns whether it synchronized; then reading numbers costs no wait."""
        if not (is_line or accelerator.is_synchronous(self.device)
                or len(self.throughput.steps) < self.throughput.warmup_steps):
            return False
        accelerator.synchronize(self.device)
        now = time.time()
        for images, before, after in self.untimed:
            self.step_seconds.update((now - self.since) / len(self.untimed))
            self.data_seconds.update(accelerator.elapsed_seconds(before, after))
            self.throughput.update(images, self.step_seconds.value, self.data_seconds.value)
        self.since, self.untimed = now, []
        return True

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.step_seconds.median, 1e-9)


def should_log(step: int, steps: int) -> bool:
    """Whether a line is printed after this step: every tenth, and the last."""
    return step % 10 == 0 or step == steps - 1


class Throughput:
    """Images per second of a run, without its first steps, which compile kernels and fill caches.

    `earlier` is the result of `totals` before the run was resumed.
    """

    def __init__(self, warmup_steps: int = 5, earlier: Sequence[float] = (0, 0., 0., 0)) -> None:
        self.warmup_steps, self.earlier = warmup_steps, earlier
        self.steps: List[Tuple[int, float, float]] = []  # (images, seconds, seconds of waiting for the loader)

    def update(self, images: int, seconds: float, data_seconds: float = 0.) -> None:
        self.steps.append((images, seconds, data_seconds))

    def since(self, step: int) -> 'Throughput':
        """The throughput from a step on, such as of an epoch; it excludes the run's first steps."""
        part = Throughput(max(self.warmup_steps - step, 0))
        part.steps = self.steps[step:]
        return part

    def totals(self) -> List[float]:
        """Totals: [images, seconds, seconds of waiting for data, steps]."""
        steps = np.array([step + (1,) for step in self.steps], dtype=np.float64).reshape(-1, 4)
        counted = steps[min(self.warmup_steps, len(steps) // 2):]
        if 2 * counted[:, 0].sum() < steps[:, 0].sum():
            counted = steps  # else too few batches remain
        return (counted.sum(0) + np.asarray(self.earlier, dtype=np.float64)).tolist()

    @property
    def images_per_second(self) -> float:
        images, seconds, _, _ = self.totals()
        return images / max(seconds, 1e-9)

    @property
    def step_milliseconds(self) -> float:
        _, seconds, _, steps = self.totals()
        return 1000 * seconds / max(steps, 1)

    @property
    def data_share(self) -> float:
        """The share of the time that the device waited for data."""
        _, seconds, data_seconds, _ = self.totals()
        return data_seconds / max(seconds, 1e-9)

    def bottleneck(self) -> str:
        """Whether the device or the loader limits the speed, as text."""
        waited = 'the device waited for data %.1f %% of the time' % (100 * self.data_share)
        if self.data_share < 0.1:
            return 'the device is the limit: ' + waited.replace('the device', 'it')
        advice = '; more --num_workers or, for JPEG files, --data_backend fast may help'
        return ('the loader is the limit: ' if self.data_share >= 0.5 else '') + waited + advice


class TensorboardLogger:
    """Writes scalars and images for TensorBoard, by tensorboardX. Steps are the caller's, in updates or epochs.

    It does not use SummaryWriter, whose thread ends at a full disk and leaves the program waiting forever. Raises
    `UserError` if the folder can't be written.
    """

    def __init__(self, log_dir: str) -> None:
        try:
            from tensorboardX import event_file_writer, summary  # an optional package
            from tensorboardX.proto.event_pb2 import Event
        except ImportError as error:
            raise UserError('--log_dir %s: tensorboardX cannot be imported (%s); %s' % (
                escape_text(log_dir), error, startup.pip_install('tensorboardX'))) from None
        self.log_dir, self.summary, self.event = log_dir, summary, Event
        with self.one_line_error():
            os.makedirs(log_dir, exist_ok=True)
            self.writer = event_file_writer.EventsWriter(os.path.join(log_dir, 'events'))

    @contextlib.contextmanager
    def one_line_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError('--log_dir %s: cannot write there (%s); make room, or choose another'
                            % (escape_text(self.log_dir), error.strerror or error)) from None

    def write(self, summary: Any, step: int) -> None:
        with self.one_line_error():
            self.writer.write_event(self.event(summary=summary, step=step, wall_time=time.time()))
            self.writer.flush()

    def update(self, head: str, step: int, **values: Any) -> None:
        for name, value in values.items():
            if value is not None:
                self.write(self.summary.scalar('%s/%s' % (head, name), float(value)), step)

    def image(self, tag: str, step: int, pixels: np.ndarray) -> None:
        """Write an image, uint8 (H, W, 3)."""
        self.write(self.summary.image(tag, pixels, dataformats='HWC'), step)

    def close(self) -> None:
        with self.one_line_error():
            self.writer.close()


# ---- the average of the weights

class ModelEma:
    """Exponential moving average of a model's weights, in float32: ema = decay * ema + (1 - decay) * weights.

    Integer buffers are copied. Averaging them, as timm 1.0 does, turns the relative position index 5 into 4:
    5 * 0.9999 + 5 * 0.0001 is below 5 and is truncated.

    Attributes:
        ema (Module): the averaged model, for evaluation.

    Args:
        warmup (bool): begin with a lower decay, as timm's ModelEmaV3 with `use_warmup`.
    """

    def __init__(self, model: torch.nn.Module, decay: float = 0.9999,
                 device: Union[str, torch.device, None] = None, warmup: bool = False) -> None:
        self.ema = copy.deepcopy(model).eval()
        self.decay, self.warmup = decay, warmup
        if device is not None:
            self.ema.to(device)
        for parameter in self.ema.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def update(self, state: Dict[str, torch.Tensor], skip: Any = False, step: int = 0) -> None:
        """Update the average with `state`, the model's weights and buffers, {name: float32 tensor}, unless `skip`.

        Args:
            step (int): the update step of the run, from 0.
            skip (bool or 0-dim bool tensor): whether the update was skipped, as `LossScaler.last_skipped` says.
        """
        averages = self.ema.state_dict()
        floats = [name for name, average in averages.items() if average.is_floating_point()]
        values = [state[name].to(averages[name].device) for name in floats]
        decay = min(self.decay, 1 - (1 + step) ** (-2 / 3)) if self.warmup else self.decay
        kernels.foreach_lerp([averages[name] for name in floats], values, decay, skip)
        for name in set(averages) - set(floats):
            averages[name].copy_(state[name])


# ---- random numbers

def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)
    accelerator.seed_device(seed)


def seed_step(seed: int, update_step: int) -> None:
    """Seed every generator for one update of this process. So a run can resume after any update, without saved state.

    Numbers drawn by an evaluation or a loader in between make no difference.
    """
    words = np.random.SeedSequence([seed, process_group.rank(), update_step]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])
    accelerator.seed_device(words[2])
